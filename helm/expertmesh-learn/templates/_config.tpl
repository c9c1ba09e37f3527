{{/* The application's configuration, as the program's own parser takes it. */}}
{{- define "expertmesh-learn.config" -}}
{{- $training := dict
      "workers" (int .Values.trainers.replicas)
      "threads" (int (include "expertmesh-learn.cores" (ternary .Values.trainers .Values.head (gt (int .Values.trainers.replicas) 0)).resources.limits.cpu))
      "gentle" false -}}
{{- if gt (int .Values.trainers.replicas) 0 -}}
{{- $_ := set $training "labels" (dict "expertmesh.io/role" "trainer") -}}
{{- end -}}
{{- $learning := dict
      "stream" .Values.stream.url
      "state" .Values.state.url
      "options" .Values.learning.options
      "known" .Values.learning.known
      "training" (mergeOverwrite $training (deepCopy .Values.learning.training))
      "gate" .Values.learning.gate -}}
{{- $config := dict
      "model" (dict "path" .Values.model.path)
      "versions" (dict "store" .Values.versions.store "options" .Values.versions.options "alias" .Values.versions.alias)
      "ray" (dict "address" "auto")
      "learning" (mergeOverwrite $learning (deepCopy .Values.learning.more))
      "log_level" .Values.logLevel -}}
{{ toYaml $config }}
{{- end -}}
