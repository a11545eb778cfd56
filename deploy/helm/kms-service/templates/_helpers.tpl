{{/* Names. The API has the name of the release where that says kms-service, else <release>-kms-service. */}}
{{- define "kms.name" -}}
{{- if contains "kms-service" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-kms-service" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "kms.component" -}}
{{- $name := include "kms.name" .root -}}
{{- if eq .component "api" }}{{ $name }}{{ else }}{{ $name }}-{{ .component }}{{ end -}}
{{- end }}

{{- define "kms.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "kms.name" .) -}}
{{- end }}

{{/* Labels that never change: selectors are immutable. */}}
{{- define "kms.selector" -}}
app.kubernetes.io/name: kms-service
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "kms.labels" -}}
app.kubernetes.io/name: kms-service
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: kms-service
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "kms.image" -}}
{{- with .Values.image -}}
{{- $tag := .tag | default $.Chart.AppVersion -}}
{{ .repository }}:{{ $tag }}{{ with .digest }}@{{ . }}{{ end }}
{{- end -}}
{{- end }}

{{- define "kms.kind" -}}
{{- if eq .Values.persistence.kind "perPod" }}StatefulSet{{ else }}Deployment{{ end -}}
{{- end }}

{{- define "kms.scheme" -}}
{{- if .Values.secrets.tls }}HTTPS{{ else }}HTTP{{ end -}}
{{- end }}
