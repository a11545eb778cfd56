{{/* API or workers: a StatefulSet, or a Deployment where pods have no volume of their own. */}}
{{- define "kms.workload" -}}
{{- $root := .root -}}
{{- $values := index .root.Values .component -}}
{{- $name := include "kms.component" . -}}
{{- $kind := include "kms.kind" $root -}}
apiVersion: apps/v1
kind: {{ $kind }}
metadata:
  name: {{ $name }}
  labels:
    {{- include "kms.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  {{- if not .scaled }}
  replicas: {{ $values.replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  selector:
    matchLabels:
      {{- include "kms.selector" . | nindent 6 }}
  {{- if eq $kind "StatefulSet" }}
  serviceName: {{ $name }}
  podManagementPolicy: Parallel
  persistentVolumeClaimRetentionPolicy: {whenDeleted: Retain, whenScaled: Retain} # the audit log of a pod that went
  volumeClaimTemplates:
    - apiVersion: v1
      kind: PersistentVolumeClaim
      metadata:
        name: state
        {{- with $root.Values.persistence.annotations }}
        annotations:
          {{- toYaml . | nindent 10 }}
        {{- end }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $root.Values.persistence.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests: {storage: {{ $root.Values.persistence.size }}}
  {{- else }}
  strategy:
    rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
  {{- end }}
  template:
    metadata:
      labels:
        {{- include "kms.selector" . | nindent 8 }}
      annotations:
        checksum/settings: {{ include "kms.toml" $root | sha256sum }} # changed settings roll the pods
        {{- with $values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ include "kms.serviceAccount" $root }}
      automountServiceAccountToken: false
      enableServiceLinks: false # their variables begin with KMS_, as settings do
      terminationGracePeriodSeconds: {{ .grace }}
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with $values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "kms.podSecurity" . | nindent 8 }}
      topologySpreadConstraints:
        {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
        - maxSkew: 1
          topologyKey: {{ . }}
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "kms.selector" $ | nindent 14 }}
        {{- end }}
      containers:
        - name: {{ .container }}
          image: {{ include "kms.image" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          {{- if eq .component "worker" }}
          command: [kms-worker]
          {{- end }}
          env:
            {{- include "kms.env" $root | nindent 12 }}
          ports:
            - {name: {{ .port }}, containerPort: {{ .number }}}
          {{- /* Not /readyz of the API: a lost key server would take away every replica at once, and what works without
                 it. A lost backend or Redis is no reason to restart either. A worker is ready once it takes jobs. */}}
          startupProbe: # the key server may be slow to answer the first check
            httpGet: {path: /livez, port: {{ .port }}, scheme: {{ .scheme }}}
            periodSeconds: 2
            failureThreshold: 60
          livenessProbe:
            httpGet: {path: /livez, port: {{ .port }}, scheme: {{ .scheme }}}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            httpGet: {path: {{ eq .component "worker" | ternary "/readyz" "/livez" }}, port: {{ .port }}, scheme: {{ .scheme }}}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 2
          {{- if eq .component "api" }}
          lifecycle:
            preStop: # until every node has heard that this pod takes no more connections
              sleep: {seconds: 5}
          {{- end }}
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          securityContext:
            {{- include "kms.containerSecurity" . | nindent 12 }}
          volumeMounts:
            {{- include "kms.mounts" $root | nindent 12 }}
      volumes:
        {{- include "kms.volumes" $root | nindent 8 }}
        {{- if eq $root.Values.persistence.kind "none" }}
        - name: state
          emptyDir: {sizeLimit: {{ $root.Values.persistence.size }}}
        {{- else if eq $root.Values.persistence.kind "oneNode" }}
        - name: state
          persistentVolumeClaim: {claimName: {{ include "kms.name" $root }}-state}
        {{- end }}
{{- end }}
