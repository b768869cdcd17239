{{- define "hicache.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "hicache.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "hicache.secretName" -}}
{{ .Values.secret.existing | default (include "hicache.name" .) }}
{{- end }}

{{- define "hicache.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* Settings of the cache; with the chart's own Valkey, where that is. */ -}}
{{- define "hicache.config" -}}
{{- $config := deepCopy .Values.config }}
{{- if and .Values.valkey.enabled (eq ($config.hicache_storage_backend | default "") "redis") }}
{{- $extra := $config.hicache_storage_backend_extra_config | default dict }}
{{- $url := printf "redis://%s-valkey:6379" (include "hicache.name" .) }}
{{- $_ := set $config "hicache_storage_backend_extra_config" (merge (dict "url" $url) $extra) }}
{{- end }}
{{- toPrettyJson $config }}
{{- end }}

{{- define "hicache.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "hicache.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
