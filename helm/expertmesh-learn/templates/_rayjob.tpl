{{/* What one round is: a Ray cluster, one command in it, and the end of both. */}}
{{- define "expertmesh-learn.rayJobSpec" -}}
# Learns all that waits in the stream, publishes what passes the gate, and ends; serving it is somebody else's decision.
entrypoint: expertmesh learn serve --until-idle --publish-only
submissionMode: {{ .Values.job.submissionMode }}
{{- if eq .Values.job.submissionMode "K8sJobMode" }}
submitterPodTemplate:
  metadata:
    labels:
      {{- include "expertmesh-learn.podLabels" (dict "root" . "component" "job") | nindent 6 }}
  spec:
    restartPolicy: Never
    automountServiceAccountToken: false
    enableServiceLinks: false
    securityContext:
      {{- include "expertmesh-learn.podSecurity" . | nindent 6 }}
    {{- with .Values.imagePullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    containers:
      - name: ray-job-submitter
        image: {{ include "expertmesh-learn.image" . | quote }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        env:
          - {name: HOME, value: /tmp}
        resources:
          {{- toYaml .Values.submitter.resources | nindent 10 }}
        securityContext:
          {{- include "expertmesh-learn.containerSecurity" . | nindent 10 }}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
    volumes:
      - name: tmp
        emptyDir:
          sizeLimit: 1Gi
{{- end }}
shutdownAfterJobFinishes: true
ttlSecondsAfterFinished: {{ int .Values.job.ttlSecondsAfterFinished }}
activeDeadlineSeconds: {{ int .Values.job.activeDeadlineSeconds }}
preRunningDeadlineSeconds: {{ int .Values.job.preRunningDeadlineSeconds }}
backoffLimit: {{ int .Values.job.backoffLimit }}
rayClusterSpec:
  rayVersion: {{ .Values.rayVersion | quote }}
  {{- if .Values.auth.enabled }}
  authOptions:
    mode: token
    {{- with .Values.auth.secretName }}
    secretName: {{ . }}
    {{- end }}
  {{- end }}
  headGroupSpec:
    # The command runs here; nothing of Ray's is to be placed beside it.
    rayStartParams:
      num-cpus: "0"
      object-store-memory: "268435456"
    labels:
      expertmesh.io/role: head
    template:
      {{- include "expertmesh-learn.rayPod" (dict "root" . "component" "head" "container" "ray-head" "group" .Values.head) | nindent 6 }}
  {{- if gt (int .Values.trainers.replicas) 0 }}
  workerGroupSpecs:
    - groupName: trainers
      replicas: {{ int .Values.trainers.replicas }}
      minReplicas: {{ int .Values.trainers.replicas }}
      maxReplicas: {{ int .Values.trainers.replicas }}
      rayStartParams:
        object-store-memory: "268435456"
      # By these Ray Train finds the nodes that are there for it.
      labels:
        expertmesh.io/role: trainer
      template:
        {{- include "expertmesh-learn.rayPod" (dict "root" . "component" "trainer" "container" "ray-worker" "group" .Values.trainers) | nindent 8 }}
  {{- end }}
{{- end -}}
