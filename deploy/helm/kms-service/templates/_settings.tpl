{{/* What the chart derives from the other values, in YAML, from [kms] on. */}}
{{- define "kms.derived" -}}
{{- $name := include "kms.name" . -}}
{{- $namespace := .Release.Namespace -}}
environment: {{ .Values.environment }}
bind: 0.0.0.0
state_dir: /var/lib/kms-service
prod_backend: age
redis:
  url: {{ .Values.redis.url | quote }}
  {{- if .Values.secrets.redis }}
  password_file: /run/secrets/redis/password
  {{- end }}
auth:
  mode: required
  {{- with .Values.store.state }}
  tokens: s3://{{ . }}/tokens
  {{- end }}
server:
  metrics: token
  allowed_hosts:
    - {{ $name }}
    - {{ $name }}.{{ $namespace }}
    - {{ $name }}.{{ $namespace }}.svc
    - {{ $name }}.{{ $namespace }}.svc.cluster.local
    {{- if .Values.ingress.enabled }}
    - {{ .Values.ingress.host }}
    {{- end }}
  {{- if .Values.secrets.tls }}
  tls_cert: /run/secrets/tls/tls.crt
  tls_key: /run/secrets/tls/tls.key
  {{- end }}
jobs:
  roots: []
  {{- if .Values.secrets.keys }}
  spool_identity_path: /run/secrets/keys/spool.key
  intake_identity_path: /run/secrets/keys/intake.key
  {{- end }}
  {{- with .Values.store.spool }}
  spool_bucket:
    url: s3://{{ . }}
    {{- include "kms.bucket" $ | nindent 4 }}
  {{- end }}
  {{- with .Values.store.state }}
  buckets:
    {{ . }}:
      {{- include "kms.bucket" $ | nindent 6 }}
  {{- end }}
{{- if ne .Values.environment "dev" }}
audit:
  durability: fsync
{{- end }}
log:
  format: json
{{- end }}

{{- define "kms.bucket" -}}
region: {{ .Values.store.region }}
{{- with .Values.store.endpoint }}
endpoint: {{ . }}
{{- end }}
{{- with .Values.store.accessKeyId }}
access_key_id: {{ . | quote }}
secret_key_file: /run/secrets/bucket/secret-key
{{- end }}
{{- end }}

{{/* A table of TOML with those below it. Helm's own toToml writes integers as floats. */}}
{{- define "kms.table" -}}
{{- $path := .path -}}
[{{ $path }}]
{{- range $key, $value := .table }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ include "kms.key" $key }} = {{ include "kms.value" $value }}
{{- end }}
{{- end }}
{{- range $key, $value := .table }}
{{- if kindIs "map" $value }}

{{ include "kms.table" (dict "path" (printf "%s.%s" $path (include "kms.key" $key)) "table" $value) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kms.key" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{- define "kms.value" -}}
{{- if kindIs "float64" . -}}
{{- if eq (floor .) . }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- else if kindIs "slice" . -}}
[{{ range $index, $value := . }}{{ if $index }}, {{ end }}{{ include "kms.value" $value }}{{ end }}]
{{- else if kindIs "map" . -}}
{ {{- range $index, $key := keys . | sortAlpha }}{{ if $index }},{{ end }} {{ include "kms.key" $key }} = {{ include "kms.value" (get $ $key) }}{{ end }} }
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{- define "kms.toml" -}}
{{- $settings := mergeOverwrite (include "kms.derived" . | fromYaml) (deepCopy .Values.settings) -}}
# Written by the chart kms-service from its values; every key is explained in docs/kms.example.toml.
{{ include "kms.table" (dict "path" "kms" "table" $settings) }}
{{- end }}
