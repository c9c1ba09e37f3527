{{/* Names. KubeRay takes 47 characters for a RayJob and the CronJob appends 9: 36 are left. */}}
{{- define "expertmesh-learn.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 36 | trimSuffix "-" -}}
{{- end -}}

{{- define "expertmesh-learn.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- else if contains (include "expertmesh-learn.name" .) .Release.Name -}}
{{- .Release.Name | trunc 36 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "expertmesh-learn.name" .) | trunc 36 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh-learn.serviceAccount" -}}
{{- default (printf "%s-submitter" (include "expertmesh-learn.fullname" .)) .Values.serviceAccount.name -}}
{{- end -}}

{{/* What selects pods of this release. KubeRay sets app.kubernetes.io/name of Ray's pods itself. */}}
{{- define "expertmesh-learn.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: expertmesh
{{- end -}}

{{- define "expertmesh-learn.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "expertmesh-learn.selector" . }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods: without the chart's version, or every upgrade would make other pods. */}}
{{- define "expertmesh-learn.podLabels" -}}
{{ include "expertmesh-learn.selector" .root }}
app.kubernetes.io/component: {{ .component }}
expertmesh.io/role: {{ .component }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "expertmesh-learn.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* Whole cores of a quantity such as 4 or 3500m, rounded up. */}}
{{- define "expertmesh-learn.cores" -}}
{{- $quantity := toString . -}}
{{- if hasSuffix "m" $quantity -}}
{{- ceil (divf (trimSuffix "m" $quantity | float64) 1000.0) -}}
{{- else -}}
{{- ceil (float64 $quantity) -}}
{{- end -}}
{{- end -}}

{{/* What is kept where: versions, stream and state by their key. */}}
{{- define "expertmesh-learn.places" -}}
{{- toYaml (dict "versions.store" .Values.versions.store "stream.url" .Values.stream.url "state.url" .Values.state.url) -}}
{{- end -}}

{{/* The volumes that places are on, of versions, stream and state: `volumes: [...]`. */}}
{{- define "expertmesh-learn.used" -}}
{{- $used := list -}}
{{- range $volume := list "versions" "stream" "state" -}}
{{- range $place := include "expertmesh-learn.places" $ | fromYaml -}}
{{- if or (eq $place (printf "/%s" $volume)) (hasPrefix (printf "/%s/" $volume) $place) -}}
{{- $used = append $used $volume -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "volumes" (uniq $used)) -}}
{{- end -}}

{{/* The claim of learning's state. */}}
{{- define "expertmesh-learn.stateClaim" -}}
{{- default (printf "%s-state" (include "expertmesh-learn.fullname" .)) .Values.state.existingClaim -}}
{{- end -}}

{{/* Environment of everything in the image: what is written goes to the volume at /cache. */}}
{{- define "expertmesh-learn.environment" -}}
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: NUMBA_CACHE_DIR, value: /cache/numba}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end -}}

{{/* The container's and the pod's security: what the level `restricted` of pod security asks for, and no more rights. */}}
{{- define "expertmesh-learn.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "expertmesh-learn.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}
