{{/* Volumes of head and trainers. */}}
{{- define "expertmesh-learn.volumes" -}}
- name: config
  configMap:
    name: {{ include "expertmesh-learn.fullname" . }}-config
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.model.existingClaim }}
    readOnly: true
{{- range (include "expertmesh-learn.used" . | fromYaml).volumes }}
- name: {{ . }}
  persistentVolumeClaim:
    claimName: {{ ternary (include "expertmesh-learn.stateClaim" $) (index $.Values . "existingClaim") (eq . "state") }}
{{- end }}
- name: cache
  emptyDir:
    sizeLimit: {{ .Values.cache.sizeLimit }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.cache.sizeLimit }}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.shmSize }}
{{- end -}}

{{- define "expertmesh-learn.mounts" -}}
- {name: config, mountPath: /etc/expertmesh, readOnly: true}
- {name: models, mountPath: /models, readOnly: true}
{{- range (include "expertmesh-learn.used" . | fromYaml).volumes }}
- {name: {{ . }}, mountPath: /{{ . }}}
{{- end }}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
- {name: shared-memory, mountPath: /dev/shm}
{{- end -}}

{{/* A pod of the round's Ray cluster. Takes root, component (head or trainer), container and group (its values). */}}
{{- define "expertmesh-learn.rayPod" -}}
metadata:
  labels:
    {{- include "expertmesh-learn.podLabels" . | nindent 4 }}
spec:
  # KubeRay begins a round anew on new pods; a container that starts again would join a cluster that is gone.
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 60
  securityContext:
    {{- include "expertmesh-learn.podSecurity" .root | nindent 4 }}
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range .group.topologySpreadConstraints }}
    -
      {{- toYaml . | nindent 6 }}
      labelSelector:
        matchLabels:
          {{- include "expertmesh-learn.selector" $.root | nindent 10 }}
          app.kubernetes.io/component: {{ $.component }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "expertmesh-learn.image" .root | quote }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      {{- if eq .component "head" }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
      {{- end }}
      env:
        {{- include "expertmesh-learn.environment" .root | nindent 8 }}
        - {name: EXPERTMESH_CONFIG, value: /etc/expertmesh/expertmesh.yaml}
        # Threads see the node's cores, not the pod's share of them.
        - name: OMP_NUM_THREADS
          valueFrom:
            resourceFieldRef:
              containerName: {{ .container }}
              resource: limits.cpu
        {{- with .root.Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .root.Values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- toYaml .group.resources | nindent 8 }}
      securityContext:
        {{- include "expertmesh-learn.containerSecurity" .root | nindent 8 }}
      volumeMounts:
        {{- include "expertmesh-learn.mounts" .root | nindent 8 }}
  volumes:
    {{- include "expertmesh-learn.volumes" .root | nindent 4 }}
{{- end -}}
