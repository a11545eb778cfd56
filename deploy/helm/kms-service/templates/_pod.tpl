{{/* What all pods of the service have in common. */}}
{{- define "kms.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
# Only an empty volume is given to the group: later it would open private files (0600) to it.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kms.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "kms.env" -}}
- name: PROVISIONING_ENV
  value: {{ .Values.environment }}
{{- range $variable, $value := .Values.env }}
- name: {{ $variable }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "kms.mounts" -}}
- {name: settings, mountPath: /etc/kms-service, readOnly: true}
- {name: state, mountPath: /var/lib/kms-service}
- {name: tmp, mountPath: /tmp}
{{- range $directory, $secret := .Values.secrets }}
{{- if $secret }}
- {name: secret-{{ $directory }}, mountPath: /run/secrets/{{ $directory }}, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{/* All but the state. */}}
{{- define "kms.volumes" -}}
- name: settings
  configMap: {name: {{ include "kms.name" . }}}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 64Mi}
# Files of root that the group 10001 (fsGroup) may read. As files, not variables: those are inherited, dumped and shown
# by kubectl describe.
{{- range $directory, $secret := .Values.secrets }}
{{- if $secret }}
- name: secret-{{ $directory }}
  secret: {secretName: {{ $secret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}
