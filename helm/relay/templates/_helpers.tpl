{{/* Names are short enough that the longest suffix, and what controllers append to it, still fits into 63 characters. */}}
{{- define "relay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{- define "relay.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride | default (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) -}}
{{- $full | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that select pods: for a role with (list $ "worker"), for the whole release with (list $ ""). */}}
{{- define "relay.selectorLabels" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}
app.kubernetes.io/name: {{ include "relay.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
{{- with $component }}
app.kubernetes.io/component: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "relay.labels" -}}
{{- $root := index . 0 -}}
{{- $own := include "relay.selectorLabels" . | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/version" $root.Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/part-of" "call-relay" -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") -}}
{{- merge $own $root.Values.commonLabels | toYaml -}}
{{- end -}}

{{/* Selects the pods of the three roles, and nothing else in this release. */}}
{{- define "relay.processLabels" -}}
{{ include "relay.selectorLabels" (list . "") }}
call-relay/process: relay
{{- end -}}

{{- define "relay.image" -}}
{{- $image := index . 0 -}}{{- $tag := index . 1 -}}
{{- printf "%s:%s" $image.repository (default $tag $image.tag) -}}{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "relay.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "relay.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "relay.configSecret" -}}
{{- default (printf "%s-config" (include "relay.fullname" .)) .Values.existingConfigSecret -}}
{{- end -}}

{{- define "relay.generatedSecret" -}}
{{- include "relay.fullname" . }}-generated
{{- end -}}

{{- define "relay.secretsName" -}}
{{- .Values.secrets.generate | ternary (include "relay.generatedSecret" .) .Values.secrets.existingSecret -}}
{{- end -}}

{{- define "relay.redisSecret" -}}
{{- default (printf "%s-redis" (include "relay.fullname" .)) .Values.redis.existingSecret -}}
{{- end -}}

{{- define "relay.valkeySecret" -}}
{{- default (include "relay.generatedSecret" .) .Values.valkey.existingSecret -}}
{{- end -}}

{{- define "relay.recordingsClaim" -}}
{{- default (printf "%s-recordings" (include "relay.fullname" .)) .Values.recordings.persistence.existingClaim -}}
{{- end -}}

{{/* Selects the metrics of this release; the PodMonitor sets the job label. */}}
{{- define "relay.series" -}}
namespace={{ .Release.Namespace | quote }},job={{ .Release.Name | quote }}
{{- end -}}

{{/*
Environment variables: what the chart sets, and secrets. They take precedence over relay.yaml.
*/}}
{{- define "relay.env" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- $v := $root.Values -}}
- {name: RELAY_API__HOST, value: {{ $v.listenHost | quote }}}
- {name: RELAY_API__PORT, value: "8080"}
- {name: RELAY_INTERNAL__HOST, value: {{ $v.listenHost | quote }}}
- {name: RELAY_INTERNAL__PORT, value: "9090"}
- {name: RELAY_DATA_DIR, value: /var/lib/relay}
- {name: RELAY_DRAIN_S, value: {{ int $v.drainSeconds | quote }}}
{{- with $v.publicUrl }}
- {name: RELAY_PUBLIC_URL, value: {{ . | quote }}}
{{- end }}
{{- if $v.recordings.persistence.enabled }}
- {name: RELAY_STORAGE_URL, value: /var/lib/relay/recordings}
{{- else if $v.recordings.storageUrl }}
- {name: RELAY_STORAGE_URL, value: {{ $v.recordings.storageUrl | quote }}}
{{- end }}
{{- if $v.valkey.enabled }}
- name: VALKEY_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "relay.valkeySecret" $root }}, key: valkey-password}
- {name: RELAY_REDIS_URL, value: "redis://:$(VALKEY_PASSWORD)@{{ include "relay.fullname" $root }}-valkey:6379/0"}
{{- else }}
- name: RELAY_REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ include "relay.redisSecret" $root }}, key: {{ $v.redis.url | empty | ternary $v.redis.existingSecretKey "redis-url" | quote }}}
{{- end }}
- name: RELAY_SECRET_KEY
  valueFrom:
    secretKeyRef: {name: {{ include "relay.secretsName" $root }}, key: {{ $v.secrets.generate | ternary "secret-key" $v.secrets.secretKeyKey | quote }}}
{{- if eq $role "api" }}
- name: RELAY_API__TOKENS
  valueFrom:
    secretKeyRef: {name: {{ include "relay.secretsName" $root }}, key: {{ $v.secrets.generate | ternary "api-tokens" $v.secrets.apiTokensKey | quote }}, optional: {{ not $v.secrets.generate }}}
{{- end }}
{{- with $v.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A Deployment of one role: (list $ "worker"). */}}
{{- define "relay.deployment" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- include "relay.check" $root -}}
{{- $v := $root.Values -}}{{- $own := index $v $role -}}
{{- $scaled := and (eq $role "worker") (ne $v.worker.autoscaling.mode "none") -}}
{{- $volume := $v.recordings.persistence.enabled -}}
{{- $oneNode := and $volume (not (has "ReadWriteMany" $v.recordings.persistence.accessModes)) -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "relay.fullname" $root }}-{{ $role }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "relay.labels" . | nindent 4 }}
spec:
  {{- if not $scaled }}
  replicas: {{ int $own.replicaCount }}
  {{- end }}
  revisionHistoryLimit: 5
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  selector:
    matchLabels:
      {{- include "relay.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- $labels := merge (dict "call-relay/process" "relay") (include "relay.labels" . | fromYaml) $own.podLabels }}
        {{- toYaml $labels | nindent 8 }}
      annotations:
        checksum/config: {{ list $v.config $v.redis.url | toJson | sha256sum }}
        {{- with $own.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      enableServiceLinks: false
      automountServiceAccountToken: false
      serviceAccountName: {{ include "relay.serviceAccountName" $root }}
      terminationGracePeriodSeconds: {{ add (int $v.drainSeconds) 15 }}
      {{- with $v.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $own.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      securityContext:
        {{- toYaml $v.podSecurityContext | nindent 8 }}
      containers:
        - name: relay
          image: {{ include "relay.image" (list $v.image $root.Chart.AppVersion) | quote }}
          imagePullPolicy: {{ $v.image.pullPolicy }}
          args: [{{ $role }}, --config, /etc/relay/relay.yaml]
          env:
            {{- include "relay.env" . | nindent 12 }}
          {{- with $v.recordings.existingSecret }}
          envFrom:
            - secretRef: {name: {{ . }}}
          {{- end }}
          ports:
            {{- if eq $role "api" }}
            - {name: http, containerPort: 8080, protocol: TCP}
            {{- end }}
            - {name: internal, containerPort: 9090, protocol: TCP}
          startupProbe:
            httpGet: {path: /livez, port: internal}
            periodSeconds: 2
            timeoutSeconds: 2
            failureThreshold: 60
          livenessProbe:
            httpGet: {path: /livez, port: internal}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            httpGet: {path: /readyz, port: internal}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 2
          {{- if eq $role "api" }}
          lifecycle:
            # Endpoints and proxies are updated with a delay; serve requests until they are.
            preStop:
              exec: {command: [sleep, "5"]}
          {{- end }}
          resources:
            {{- toYaml $own.resources | nindent 12 }}
          securityContext:
            {{- toYaml $v.securityContext | nindent 12 }}
          volumeMounts:
            - {name: config, mountPath: /etc/relay, readOnly: true}
            - {name: data, mountPath: /var/lib/relay}
            - {name: tmp, mountPath: /tmp}
            {{- if $volume }}
            - {name: recordings, mountPath: /var/lib/relay/recordings}
            {{- end }}
            {{- if $v.credentials.existingSecret }}
            - {name: credentials, mountPath: /run/secrets/relay, readOnly: true}
            {{- end }}
            {{- with $v.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: config
          secret:
            secretName: {{ include "relay.configSecret" $root }}
            defaultMode: 0440
            items: [{key: relay.yaml, path: relay.yaml}]
        - {name: data, emptyDir: {}}
        - {name: tmp, emptyDir: {}}
        {{- if $volume }}
        - name: recordings
          persistentVolumeClaim: {claimName: {{ include "relay.recordingsClaim" $root }}}
        {{- end }}
        {{- with $v.credentials.existingSecret }}
        - name: credentials
          secret: {secretName: {{ . }}, defaultMode: 0440}
        {{- end }}
        {{- with $v.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if $v.topologySpread.enabled }}
      topologySpreadConstraints:
        {{- range $v.topologySpread.topologyKeys }}
        - maxSkew: 1
          topologyKey: {{ . }}
          {{- /* A node without a zone label is in no domain: DoNotSchedule over zones would leave every pod pending. */}}
          whenUnsatisfiable: {{ eq . "kubernetes.io/hostname" | ternary $v.topologySpread.whenUnsatisfiable "ScheduleAnyway" }}
          labelSelector:
            matchLabels:
              {{- include "relay.selectorLabels" (list $root $role) | nindent 14 }}
        {{- end }}
      {{- end }}
      {{- $affinity := deepCopy $own.affinity }}
      {{- if $oneNode }}
      {{- $together := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "relay.processLabels" $root | fromYaml)) }}
      {{- $pods := default dict $affinity.podAffinity }}
      {{- $required := append (default list $pods.requiredDuringSchedulingIgnoredDuringExecution) $together }}
      {{- $_ := set $pods "requiredDuringSchedulingIgnoredDuringExecution" $required }}
      {{- $_ := set $affinity "podAffinity" $pods }}
      {{- end }}
      {{- with $affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $own.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $own.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end -}}
