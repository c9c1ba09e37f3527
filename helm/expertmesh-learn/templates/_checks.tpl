{{/* What a schema can't say: values that need each other. */}}
{{- define "expertmesh-learn.checks" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "expertmesh-learn.fullname" .)) -}}
{{- fail (printf "the name %s is no label that begins with a letter: set fullnameOverride" (include "expertmesh-learn.fullname" .)) -}}
{{- end -}}
{{- if not .Values.model.existingClaim -}}
{{- fail "model.existingClaim is empty: name the claim that holds the folder of model.path" -}}
{{- end -}}
{{- if not (or (eq .Values.model.path "/models") (hasPrefix "/models/" .Values.model.path)) -}}
{{- fail (printf "model.path is %s: the claim of model.existingClaim is mounted at /models" .Values.model.path) -}}
{{- end -}}
{{- range $name, $place := dict "versions" .Values.versions.store "stream" .Values.stream.url "state" .Values.state.url -}}
{{- $key := ternary "versions.store" (printf "%s.url" $name) (eq $name "versions") -}}
{{- $claim := index $.Values $name "existingClaim" -}}
{{- if include "expertmesh-learn.isFolder" $place -}}
{{- if not (or (eq $place (printf "/%s" $name)) (hasPrefix (printf "/%s/" $name) $place)) -}}
{{- fail (printf "%s is %s: give a folder under /%s, where its claim is mounted, or a URL such as s3://bucket/%s" $key $place $name $name) -}}
{{- end -}}
{{- if and (not $claim) (ne $name "state") -}}
{{- fail (printf "%s.existingClaim is empty: name the claim that the server uses, or set %s to a URL" $name $key) -}}
{{- end -}}
{{- else if $claim -}}
{{- fail (printf "%s.existingClaim is given, and %s is a URL: leave one of them out" $name $key) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.scheduler "RayCronJob") (contains "TZ" .Values.schedule) -}}
{{- fail "schedule has a TZ: KubeRay refuses that, use timeZone" -}}
{{- end -}}
{{- range $name := list "head" "trainers" -}}
{{- $limits := (index $.Values $name).resources.limits -}}
{{- if not (and $limits.cpu $limits.memory) -}}
{{- fail (printf "%s.resources.limits needs cpu and memory" $name) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "workers" "labels" -}}
{{- if hasKey $.Values.learning.training $key -}}
{{- fail (printf "learning.training.%s follows from trainers: set trainers.replicas instead" $key) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "stream" "state" "options" "known" "training" "gate" -}}
{{- if hasKey $.Values.learning.more $key -}}
{{- fail (printf "learning.more.%s has a value of its own: see the chart's README" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
