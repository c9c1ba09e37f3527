{{/* What a schema can't say of values, each refused with the key that is wrong. */}}
{{- define "expertmesh.checks" -}}
{{- $v := .Values -}}
{{- if and $v.operator.enabled $v.autoscaling.enabled -}}
{{- fail "autoscaling.enabled: pods are brought and taken by one of two: set it or operator.enabled to false" -}}
{{- end -}}
{{- if and (eq $v.rayAuth.mode "token") (semverCompare "<2.52.0" $v.rayVersion) -}}
{{- fail (printf "rayVersion: %s has no token authentication, which rayAuth.mode asks for; it is there from 2.52.0 on" $v.rayVersion) -}}
{{- end -}}
{{- $ft := $v.gcsFaultTolerance -}}
{{- if and (eq $ft.backend "redis") (not $ft.redis.address) -}}
{{- fail "gcsFaultTolerance.redis.address: is empty, and gcsFaultTolerance.backend is redis" -}}
{{- end -}}
{{- if and (eq $ft.backend "rocksdb") $ft.rocksdb.claimName (ne $v.upgrade.type "None") -}}
{{- fail "gcsFaultTolerance.rocksdb.claimName: while a new cluster is brought up two would write to it; set upgrade.type to None, or leave the claim to KubeRay" -}}
{{- end -}}
{{- if and (eq $ft.backend "rocksdb") (semverCompare "<2.57.0" $v.rayVersion) -}}
{{- fail (printf "gcsFaultTolerance.backend: rocksdb needs Ray 2.57 or later, rayVersion is %s" $v.rayVersion) -}}
{{- end -}}
{{- if and $v.storage.versions.url $v.storage.versions.existingClaim -}}
{{- fail "storage.versions.existingClaim: the store of versions is at storage.versions.url already" -}}
{{- end -}}
{{- if and $v.gateway.enabled (not $v.gateway.parentRefs) -}}
{{- fail "gateway.parentRefs: is empty, so that the route would belong to no Gateway" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- fail "ingress.hosts: is empty, so that the Ingress would answer to any name" -}}
{{- end -}}
{{- if and (or $v.gateway.enabled $v.ingress.enabled) $v.networkPolicy.enabled (not $v.networkPolicy.gatewayFrom) -}}
{{- fail "networkPolicy.gatewayFrom: is empty, so that the gateway or ingress controller could not reach the API; name its pods or namespace" -}}
{{- end -}}
{{- if and (ne $v.service.type "ClusterIP") $v.networkPolicy.enabled (not $v.networkPolicy.gatewayFrom) -}}
{{- fail (printf "networkPolicy.gatewayFrom: is empty, so that nobody outside could reach the API, whose service.type is %s; name addresses as ipBlock" $v.service.type) -}}
{{- end -}}
{{- if eq ($v.config.model.path | default "default") "default" -}}
{{- fail "config.model.path: is default, a model that expertmesh makes on one machine for itself; name a folder of the model's volume, such as /models/mixtral" -}}
{{- end -}}
{{- include "expertmesh.checkDevice" (dict "key" "router" "group" $v.router) -}}
{{- include "expertmesh.checkBudget" (dict "key" "router" "group" $v.router "least" $v.router.replicas) -}}
{{- if gt (int $v.head.minAvailable) 1 -}}
{{- fail "head.minAvailable: there is one head pod" -}}
{{- end -}}
{{- include "expertmesh.checkShares" $v.router -}}
{{- $seen := dict -}}
{{- range $index, $host := $v.router.hosts -}}
{{- if hasKey $seen $host.name -}}
{{- fail (printf "router.hosts.%d.name: %s is the name of %s too" $index $host.name (get $seen $host.name)) -}}
{{- end -}}
{{- $_ := set $seen $host.name (printf "router.hosts.%d" $index) -}}
{{- end -}}
{{- range $index, $group := (include "expertmesh.groups" . | fromYaml).groups -}}
{{- $key := printf "hostGroups.%d" $index -}}
{{- if hasKey $seen $group.name -}}
{{- fail (printf "%s.name: %s is the name of %s too" $key $group.name (get $seen $group.name)) -}}
{{- end -}}
{{- $_ := set $seen $group.name $key -}}
{{- include "expertmesh.checkDevice" (dict "key" $key "group" $group) -}}
{{- with $group.autoscale -}}
{{- if not (include "expertmesh.scales" $) -}}
{{- fail (printf "%s.autoscale: nobody would bring pods or take them; set operator.enabled or autoscaling.enabled" $key) -}}
{{- end -}}
{{- if or (lt (int $group.replicas) (int .min)) (gt (int $group.replicas) (int .max)) -}}
{{- fail (printf "%s.replicas: %d is not between autoscale.min and autoscale.max, %d and %d" $key (int $group.replicas) (int .min) (int .max)) -}}
{{- end -}}
{{- end -}}
{{- include "expertmesh.checkBudget" (dict "key" $key "group" $group "least" (include "expertmesh.least" $group)) -}}
{{- end -}}
{{- end -}}

{{/* Shares of the GPUs that a router pod asks for, in ten thousandths: Ray counts in them. */}}
{{- define "expertmesh.checkShares" -}}
{{- $engine := int (round (mulf 10000 (float64 .gpus)) 0) -}}
{{- if eq .device "cpu" -}}
{{- if ne $engine 10000 -}}
{{- fail "router.gpus: is a share of a GPU, and router.device is cpu" -}}
{{- end -}}
{{- if .hosts -}}
{{- fail "router.hosts: share the engine's GPU, and router.device is cpu; name them in hostGroups" -}}
{{- end -}}
{{- else -}}
{{- $taken := $engine -}}
{{- range $index, $host := .hosts -}}
{{- $taken = add $taken (int (round (mulf 10000 (float64 $host.gpus)) 0)) -}}
{{- end -}}
{{- $there := get .resources.limits (include "expertmesh.gpu" .resources) | int -}}
{{- if gt $taken (mul 10000 $there) -}}
{{- fail (printf "router.hosts: engine and hosts take %v GPUs in all, router.resources.limits asks for %d" (divf $taken 10000) $there) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.checkDevice" -}}
{{- $gpu := include "expertmesh.gpu" .group.resources -}}
{{- if and (eq .group.device "cuda") (not $gpu) -}}
{{- fail (printf "%s.resources.limits: names no GPU, such as nvidia.com/gpu: 1, and %s.device is cuda" .key .key) -}}
{{- end -}}
{{- if and (eq .group.device "cpu") $gpu -}}
{{- fail (printf "%s.resources.limits: asks for %s, and %s.device is cpu" .key $gpu .key) -}}
{{- end -}}
{{- range $needed := list "cpu" "memory" -}}
{{- if not (get ($.group.resources.limits | default dict) $needed) -}}
{{- fail (printf "%s.resources.limits.%s: is missing" $.key $needed) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.checkBudget" -}}
{{- if not (kindIs "invalid" .group.minAvailable) -}}
{{- if and (gt (int .group.minAvailable) 0) (ge (int .group.minAvailable) (int .least)) -}}
{{- fail (printf "%s.minAvailable: %d of %d pods would keep every node from being drained" .key (int .group.minAvailable) (int .least)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
