{{/* Names, labels and images. */}}

{{- define "expertmesh.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- if gt (len $full) 47 -}}
{{- fail (printf "fullnameOverride: %q has %d characters; KubeRay names clusters and Services after it, so it may have 47" $full (len $full)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) -}}
{{- fail (printf "fullnameOverride: %q must begin with a letter and have none but a-z, 0-9 and -" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{/* What selects pods of this release. KubeRay sets app.kubernetes.io/name and created-by on Ray's pods and has its
own Services select by them, so they are left to it. */}}
{{- define "expertmesh.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: expertmesh
{{- end -}}

{{/* Labels of objects. */}}
{{- define "expertmesh.labels" -}}
{{ include "expertmesh.selector" . }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An object's metadata but for its namespace: (dict "root" $ "suffix" "-api" "labels" dict "annotations" dict). */}}
{{- define "expertmesh.metadata" -}}
name: {{ include "expertmesh.fullname" .root }}{{ .suffix }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- toYaml (merge (dict) (.labels | default dict) (include "expertmesh.labels" .root | fromYaml)) | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The image for a device: (dict "root" $ "device" "cuda"). */}}
{{- define "expertmesh.image" -}}
{{- $image := .root.Values.image -}}
{{- $tag := $image.tag | default .root.Chart.AppVersion -}}
{{- $digest := $image.digest -}}
{{- if eq .device "cuda" -}}
{{- $tag = $image.gpuTag | default (printf "%s-gpu" $tag) -}}
{{- $digest = $image.gpuDigest -}}
{{- end -}}
{{- if $digest -}}
{{- printf "%s@%s" $image.repository $digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository $tag -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.keysSecret" -}}
{{- .Values.keys.existingSecret | default (printf "%s-keys" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.modelClaim" -}}
{{- .Values.storage.model.existingClaim | default (printf "%s-model" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.versionsClaim" -}}
{{- .Values.storage.versions.existingClaim | default (printf "%s-versions" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{/* Whole CPUs of a quantity, at least 1. */}}
{{- define "expertmesh.cpus" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text -}}
{{- max 1 (div (trimSuffix "m" $text | int) 1000) -}}
{{- else -}}
{{- max 1 (floor (float64 $text) | int) -}}
{{- end -}}
{{- end -}}

{{/* The kind of GPU that resources ask for, "" for none. */}}
{{- define "expertmesh.gpu" -}}
{{- range $name, $amount := (.limits | default dict) -}}
{{- if hasSuffix "/gpu" $name -}}{{ $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* hostGroups with what hostDefaults says besides, as YAML under `groups`. A key is taken whole: resources of which
some are an entry's and some the defaults' may not go together. */}}
{{- define "expertmesh.groups" -}}
{{- $groups := list -}}
{{- range .Values.hostGroups -}}
{{- $group := deepCopy $.Values.hostDefaults -}}
{{- range $key, $value := . -}}
{{- $_ := set $group $key $value -}}
{{- end -}}
{{- $groups = append $groups $group -}}
{{- end -}}
{{- toYaml (dict "groups" $groups) -}}
{{- end -}}

{{/* Pods that a group has at least. */}}
{{- define "expertmesh.least" -}}
{{- if .autoscale -}}{{ .autoscale.min }}{{- else -}}{{ .replicas }}{{- end -}}
{{- end -}}

{{/* Whether pods of groups come and go. */}}
{{- define "expertmesh.scales" -}}
{{- if or .Values.operator.enabled .Values.autoscaling.enabled -}}true{{- end -}}
{{- end -}}
