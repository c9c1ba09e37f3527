{{/* Names, labels and images. */}}

{{- define "operator.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- if gt (len $full) 52 -}}
{{- fail (printf "fullnameOverride: %q has %d characters; it may have 52" $full (len $full)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) -}}
{{- fail (printf "fullnameOverride: %q must begin with a letter and have none but a-z, 0-9 and -" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{/* What selects its pods. expertmesh-serve lets pods of part-of expertmesh ask the admin API. */}}
{{- define "operator.selector" -}}
app.kubernetes.io/name: expertmesh-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: expertmesh
{{- end -}}

{{- define "operator.labels" -}}
{{ include "operator.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An object's metadata: of the namespace, or (dict "root" $ "wide" true) of none. A ClusterRole's name has the
namespace in it, since there may be a release in each. */}}
{{- define "operator.metadata" -}}
{{- $root := .root -}}
{{- if .wide -}}
name: {{ printf "%s-%s" $root.Release.Namespace (include "operator.fullname" $root) }}
{{- else -}}
name: {{ include "operator.fullname" $root }}
namespace: {{ $root.Release.Namespace }}
{{- end }}
labels:
  {{- include "operator.labels" $root | nindent 2 }}
{{- end -}}

{{- define "operator.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Those of securityContext's keys that are given: what is null is left to the cluster. */}}
{{- define "operator.users" -}}
{{- range $key := list "runAsUser" "runAsGroup" -}}
{{- with index $.Values.securityContext $key }}
{{ $key }}: {{ int64 . }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What a schema can't say of values. */}}
{{- define "operator.checks" -}}
{{- $v := .Values -}}
{{- if not $v.keys.existingSecret -}}
{{- fail "keys.existingSecret: is empty; name the Secret with EXPERTMESH_ADMIN_KEY that expertmesh-serve has, such as RELEASE-keys" -}}
{{- end -}}
{{- range $needed := list "cpu" "memory" -}}
{{- if not (get ($v.resources.limits | default dict) $needed) -}}
{{- fail (printf "resources.limits.%s: is missing" $needed) -}}
{{- end -}}
{{- end -}}
{{- if not (kindIs "invalid" $v.minAvailable) -}}
{{- if and (gt (int $v.minAvailable) 0) (ge (int $v.minAvailable) (int $v.replicas)) -}}
{{- fail (printf "minAvailable: %d of %d pods would keep every node from being drained" (int $v.minAvailable) (int $v.replicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
