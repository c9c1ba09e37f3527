{{/* Where Ray's control plane keeps its tables; empty for nowhere. */}}
{{- define "expertmesh.faultTolerance" -}}
{{- $ft := .Values.gcsFaultTolerance -}}
{{- if eq $ft.backend "redis" -}}
backend: redis
redisAddress: {{ $ft.redis.address | quote }}
{{- with $ft.redis.usernameSecret }}
redisUsername:
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}
{{- with $ft.redis.passwordSecret }}
redisPassword:
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}
{{- else if eq $ft.backend "rocksdb" -}}
backend: rocksdb
storage:
  {{- if $ft.rocksdb.claimName }}
  claimName: {{ $ft.rocksdb.claimName }}
  {{- else }}
  size: {{ $ft.rocksdb.size }}
  accessModes: [ReadWriteOnce]
  deletionPolicy: {{ $ft.rocksdb.deletionPolicy }}
  {{- with $ft.rocksdb.storageClassName }}
  storageClassName: {{ . }}
  {{- end }}
  {{- end }}
{{- end -}}
{{- end -}}
