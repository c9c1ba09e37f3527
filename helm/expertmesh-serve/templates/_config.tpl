{{/* expertmesh.yaml: the values under `config`, and what the chart itself decides. */}}
{{- define "expertmesh.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $router := .Values.router -}}
{{- $engine := $config.engine | default dict -}}
{{- $_ := set $engine "replicas" (int $router.replicas) -}}
{{- $_ := set $engine "device" $router.device -}}
{{- $_ := set $engine "gpus" $router.gpus -}}
{{- $_ := set $engine "selector" (dict "expertmesh.io/role" "router") -}}
{{- if not $engine.threads -}}
{{- /* `auto` would be all cores of the node, of which the pod has a part. */ -}}
{{- $_ := set $engine "threads" (include "expertmesh.cpus" $router.resources.limits.cpu | int) -}}
{{- end -}}
{{- $_ := set $config "engine" $engine -}}
{{- $hosts := list -}}
{{- range $router.hosts -}}
{{- $host := dict "name" .name "count" (int $router.replicas) "device" $router.device "gpus" .gpus "memory" (.memory | default "auto") "kernel" (.kernel | default "auto") "threads" 1 -}}
{{- $_ := set $host "selector" (dict "expertmesh.io/role" "router") -}}
{{- with .memoryLimit -}}{{- $_ := set $host "memory_limit" . -}}{{- end -}}
{{- $hosts = append $hosts $host -}}
{{- end -}}
{{- range (include "expertmesh.groups" . | fromYaml).groups -}}
{{- $host := dict "name" .name "count" (int .replicas) "device" .device "memory" .memory "kernel" .kernel -}}
{{- $_ := set $host "selector" (dict "expertmesh.io/group" .name) -}}
{{- $_ := set $host "threads" (.threads | default (include "expertmesh.cpus" .resources.limits.cpu) | int) -}}
{{- with .memoryLimit -}}{{- $_ := set $host "memory_limit" . -}}{{- end -}}
{{- with .autoscale -}}{{- $_ := set $host "autoscale" . -}}{{- end -}}
{{- $hosts = append $hosts $host -}}
{{- end -}}
{{- $_ := set $config "hosts" $hosts -}}
{{- $server := $config.server | default dict -}}
{{- $_ := set $server "host" "0.0.0.0" -}}
{{- $_ := set $server "port" 8080 -}}
{{- $_ := set $server "api_keys" (list "env:EXPERTMESH_API_KEY") -}}
{{- $_ := set $config "server" $server -}}
{{- $_ := set $config "admin" (dict "host" "0.0.0.0" "port" 8081 "keys" (list "env:EXPERTMESH_ADMIN_KEY")) -}}
{{- $ray := dict "address" "auto" "controller_selector" (dict "expertmesh.io/role" "head") -}}
{{- if .Values.operator.enabled -}}
{{- $_ := set $ray "nodes" "operator" -}}
{{- end -}}
{{- $_ := set $config "ray" $ray -}}
{{- $versions := $config.versions | default dict -}}
{{- $_ := set $versions "store" (.Values.storage.versions.url | default "/versions") -}}
{{- $_ := set $config "versions" $versions -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Where Ray Serve finds the mesh. Its own proxy runs on the head alone and only answers KubeRay's health checks:
requests go to the routers' own servers. */}}
{{- define "expertmesh.serveConfig" -}}
proxy_location: HeadOnly
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: expertmesh
    route_prefix: /
    import_path: workloads.ray_service:application
    args:
      config: /etc/expertmesh/expertmesh.yaml
{{- end -}}
