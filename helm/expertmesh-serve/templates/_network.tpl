{{/* All of the mesh's pods. */}}
{{- define "expertmesh.meshSelector" -}}
matchLabels:
  {{- include "expertmesh.selector" . | nindent 2 }}
matchExpressions:
  - {key: expertmesh.io/role, operator: In, values: [head, router, host]}
{{- end -}}

{{/* The beginning of a NetworkPolicy: (dict "root" $ "name" "api" "role" "router"); without a role of all pods. */}}
{{- define "expertmesh.policy" -}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "expertmesh.metadata" (dict "root" .root "suffix" (printf "-%s" .name)) | nindent 2 }}
spec:
  podSelector:
    {{- if .role }}
    matchLabels:
      {{- include "expertmesh.groupSelector" . | nindent 6 }}
    {{- else }}
    {{- include "expertmesh.meshSelector" .root | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "expertmesh.ports" -}}
ports:
  {{- range . }}
  - {protocol: TCP, port: {{ int . }}}
  {{- end }}
{{- end -}}

{{/* Egress to peers, [] for anywhere, on ports: (dict "to" list "ports" list). */}}
{{- define "expertmesh.egress" -}}
policyTypes: [Egress]
egress:
  - {{- with .to }}
    to:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- include "expertmesh.ports" .ports | nindent 4 }}
{{- end -}}

{{/* Ingress of peers on ports: (dict "from" list "ports" list). */}}
{{- define "expertmesh.ingress" -}}
policyTypes: [Ingress]
ingress:
  - from:
      {{- toYaml .from | nindent 6 }}
    {{- include "expertmesh.ports" .ports | nindent 4 }}
{{- end -}}
