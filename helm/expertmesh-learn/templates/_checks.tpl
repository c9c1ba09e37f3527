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
{{- range $key, $place := include "expertmesh-learn.places" . | fromYaml -}}
{{- $own := first (splitList "." $key) -}}
{{- $volume := first (splitList "/" (trimPrefix "/" $place)) -}}
{{- if and (not (contains "://" $place)) (not (has $volume (list "versions" $own))) -}}
{{- fail (printf "%s is %s: give a folder under /%s or /versions, where claims are mounted, or a URL such as s3://bucket/%s" $key $place $own $own) -}}
{{- end -}}
{{- end -}}
{{- $used := (include "expertmesh-learn.used" . | fromYaml).volumes | default list -}}
{{- range $volume := list "versions" "stream" "state" -}}
{{- $claim := index $.Values $volume "existingClaim" -}}
{{- if and (has $volume $used) (not $claim) (ne $volume "state") -}}
{{- fail (printf "%s.existingClaim is empty: name the claim that the server uses, or set what lies under /%s to a URL" $volume $volume) -}}
{{- end -}}
{{- if and $claim (not (has $volume $used)) -}}
{{- fail (printf "%s.existingClaim is given, and nothing lies under /%s: leave it out" $volume $volume) -}}
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
