{{/* The pod template of one group:
(dict "root" $ "role" "host" "name" "cpu" "group" $group "ports" $ports "readiness" $probe). */}}
{{- define "expertmesh.pod" -}}
{{- $root := .root -}}
{{- $v := .root.Values -}}
{{- $device := .group.device | default "cpu" -}}
metadata:
  labels:
    {{- include "expertmesh.podLabels" . | nindent 4 }}
  annotations:
    # A changed configuration is a changed cluster, which KubeRay brings up beside the old one.
    checksum/config: {{ include "expertmesh.config" $root | sha256sum }}
    {{- with .group.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- if and (eq .role "head") $v.autoscaling.enabled }}
  # Ray's autoscaler in this pod talks to Kubernetes; KubeRay makes its service account.
  automountServiceAccountToken: true
  {{- else }}
  serviceAccountName: {{ include "expertmesh.fullname" $root }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ int .group.terminationGracePeriodSeconds }}
  securityContext:
    runAsNonRoot: true
    {{- include "expertmesh.users" (dict "root" $root "keys" (list "runAsUser" "runAsGroup" "fsGroup")) | nindent 4 }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .group.runtimeClassName }}
  runtimeClassName: {{ . }}
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
  {{- with include "expertmesh.spread" . }}
  topologySpreadConstraints:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ eq .role "head" | ternary "ray-head" "ray-worker" }}
      image: {{ include "expertmesh.image" (dict "root" $root "device" $device) | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      securityContext:
        {{- include "expertmesh.containerSecurity" $root | nindent 8 }}
      env:
        {{- include "expertmesh.environment" $root | nindent 8 }}
        {{- with .group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $v.storage.versions.credentialsSecret }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      ports:
        {{- toYaml .ports | nindent 8 }}
      # KubeRay would otherwise wait for Ray Serve's proxy on every pod, which runs on the head alone.
      readinessProbe:
        {{- toYaml .readiness | nindent 8 }}
      resources:
        {{- toYaml .group.resources | nindent 8 }}
      volumeMounts:
        {{- include "expertmesh.mounts" $root | nindent 8 }}
  volumes:
    {{- include "expertmesh.volumes" (dict "root" $root "group" .group) | nindent 4 }}
{{- end -}}

{{/* Labels of a pod; those of the group are its Ray node's as well. */}}
{{- define "expertmesh.podLabels" -}}
{{- $own := dict "app.kubernetes.io/component" .role -}}
{{- toYaml (merge $own (include "expertmesh.selector" .root | fromYaml) (include "expertmesh.nodeLabels" . | fromYaml) .root.Values.commonLabels) -}}
{{- end -}}

{{- define "expertmesh.nodeLabels" -}}
expertmesh.io/role: {{ .role }}
{{- if eq .role "host" }}
expertmesh.io/group: {{ .name }}
{{- end }}
{{- with .group.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What the chart's own objects select a group's pods by. */}}
{{- define "expertmesh.groupSelector" -}}
{{ include "expertmesh.selector" .root }}
expertmesh.io/role: {{ .role }}
{{- if eq .role "host" }}
expertmesh.io/group: {{ .name }}
{{- end }}
{{- end -}}

{{- define "expertmesh.spread" -}}
{{- $selector := dict "matchLabels" (include "expertmesh.groupSelector" . | fromYaml) -}}
{{- $given := .group.topologySpreadConstraints -}}
{{- if and (kindIs "invalid" $given) (ne .role "head") -}}
{{- $given = list (dict "maxSkew" 1 "topologyKey" "kubernetes.io/hostname" "whenUnsatisfiable" "ScheduleAnyway") -}}
{{- end -}}
{{- $spread := list -}}
{{- range $given -}}
{{- $spread = append $spread (merge (dict) . (dict "labelSelector" $selector)) -}}
{{- end -}}
{{- with $spread -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{/* Those of securityContext's keys that are given: what is null is left to the cluster. */}}
{{- define "expertmesh.users" -}}
{{- $users := dict -}}
{{- range $key := .keys -}}
{{- /* Not `get`, which makes "" of what is missing, and so user 0. */ -}}
{{- with index $.root.Values.securityContext $key -}}
{{- $_ := set $users $key (int64 .) -}}
{{- end -}}
{{- end -}}
{{- with $users -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{- define "expertmesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "expertmesh.environment" -}}
# All that is written goes to the volume at /cache: the root file system is read-only.
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: NUMBA_CACHE_DIR, value: /cache/numba}
- {name: EXPERTMESH_CONFIG, value: /etc/expertmesh/expertmesh.yaml}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- range $name := list "EXPERTMESH_API_KEY" "EXPERTMESH_ADMIN_KEY" }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef: {name: {{ include "expertmesh.keysSecret" $ }}, key: {{ $name }}}
{{- end }}
{{- end -}}

{{- define "expertmesh.mounts" -}}
- {name: config, mountPath: /etc/expertmesh, readOnly: true}
- {name: model, mountPath: /models, readOnly: true}
{{- if not .Values.storage.versions.url }}
- {name: versions, mountPath: /versions}
{{- end }}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
- {name: shared-mem, mountPath: /dev/shm}
{{- end -}}

{{- define "expertmesh.volumes" -}}
- name: config
  configMap: {name: {{ include "expertmesh.fullname" .root }}}
- name: model
  persistentVolumeClaim: {claimName: {{ include "expertmesh.modelClaim" .root }}, readOnly: true}
{{- if not .root.Values.storage.versions.url }}
- name: versions
  persistentVolumeClaim: {claimName: {{ include "expertmesh.versionsClaim" .root }}}
{{- end }}
- name: cache
  emptyDir: {sizeLimit: {{ .group.cacheSize }}}
- name: tmp
  emptyDir: {}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ .group.shmSize }}}
{{- end -}}
