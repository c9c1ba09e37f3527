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

{{- define "expertmesh-learn.selector" -}}
app.kubernetes.io/name: {{ include "expertmesh-learn.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "expertmesh-learn.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "expertmesh-learn.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: expertmesh
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods: without the chart's version, or every upgrade would make other pods. */}}
{{- define "expertmesh-learn.podLabels" -}}
{{ include "expertmesh-learn.selector" .root }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: expertmesh
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

{{/* "true" where a place is a folder of a volume, and not a URL. */}}
{{- define "expertmesh-learn.isFolder" -}}
{{- if not (contains "://" .) -}}true{{- end -}}
{{- end -}}

{{/* The claim of learning's state. */}}
{{- define "expertmesh-learn.stateClaim" -}}
{{- default (printf "%s-state" (include "expertmesh-learn.fullname" .)) .Values.state.existingClaim -}}
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
