{{/* Checks that a JSON schema cannot express. All problems are reported at once, each with what to set. */}}
{{- define "relay.check" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- if and $v.secrets.existingSecret $v.secrets.generate -}}
{{- $wrong = append $wrong "secrets.existingSecret and secrets.generate are mutually exclusive; use the first for everything but a trial." -}}
{{- else if not (or $v.secrets.existingSecret $v.secrets.generate) -}}
{{- $wrong = append $wrong "secrets.existingSecret: set it to a Secret with the keys secret-key and api-tokens (for a trial: secrets.generate=true)." -}}
{{- end -}}
{{- $stores := 0 -}}
{{- range list $v.redis.existingSecret $v.redis.url $v.valkey.enabled -}}{{- if . -}}{{- $stores = add1 $stores -}}{{- end -}}{{- end -}}
{{- if ne (int $stores) 1 -}}
{{- $wrong = append $wrong "redis: set exactly one of redis.existingSecret, redis.url and valkey.enabled (the last is for a trial)." -}}
{{- end -}}
{{- if and $v.valkey.enabled (not $v.secrets.generate) (not $v.valkey.existingSecret) -}}
{{- $wrong = append $wrong "valkey.existingSecret: set it to a Secret with the key valkey-password (for a trial: secrets.generate=true)." -}}
{{- end -}}
{{- $places := 0 -}}
{{- range list $v.recordings.storageUrl $v.recordings.persistence.enabled $v.recordings.none -}}{{- if . -}}{{- $places = add1 $places -}}{{- end -}}{{- end -}}
{{- if ne (int $places) 1 -}}
{{- $wrong = append $wrong "recordings: set exactly one of recordings.storageUrl, recordings.persistence.enabled and recordings.none." -}}
{{- end -}}
{{- if $v.recordings.none -}}
{{- range $id, $source := default dict $v.config.sources -}}
{{- if or (not (hasKey $source "recordings")) $source.recordings -}}
{{- $wrong = append $wrong (printf "config.sources.%s: recordings.none is set, so the source must set `recordings: false`." $id) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.recordings.persistence.enabled (not (has "ReadWriteMany" $v.recordings.persistence.accessModes)) $v.topologySpread.enabled (eq $v.topologySpread.whenUnsatisfiable "DoNotSchedule") -}}
{{- $wrong = append $wrong "topologySpread.whenUnsatisfiable: a ReadWriteOnce volume keeps all pods on one node, so DoNotSchedule would leave pods pending." -}}
{{- end -}}
{{- $rest := omit $v.config "log" -}}
{{- if and $v.existingConfigSecret $rest -}}
{{- $wrong = append $wrong (printf "config and existingConfigSecret are mutually exclusive; config has: %s." (keys $rest | sortAlpha | join ", ")) -}}
{{- end -}}
{{- $owned := dict "data_dir" "the chart sets it" "drain_s" "set drainSeconds" "internal" "the chart sets it" "public_url" "set publicUrl" "redis_url" "set redis.existingSecret" "secret_key" "set secrets.existingSecret" "storage_url" "set recordings.storageUrl" -}}
{{- range $key := keys $owned | sortAlpha -}}
{{- if hasKey $v.config $key -}}
{{- $wrong = append $wrong (printf "config.%s has no effect; %s." $key (get $owned $key)) -}}
{{- end -}}
{{- end -}}
{{- range list "host" "port" -}}
{{- if hasKey (default dict $v.config.api) . -}}
{{- $wrong = append $wrong (printf "config.api.%s has no effect; the chart sets it." .) -}}
{{- end -}}
{{- end -}}
{{- $needed := add (int (ceil (default 15 (get (default dict $v.config.delivery) "timeout_s")))) 5 -}}
{{- if lt (int $v.drainSeconds) (int $needed) -}}
{{- $wrong = append $wrong (printf "drainSeconds: must be at least config.delivery.timeout_s + 5, which is %d; it is %d." (int $needed) (int $v.drainSeconds)) -}}
{{- end -}}
{{- if gt (len (toYaml $v.config)) 1000000 -}}
{{- $wrong = append $wrong "config: a Secret is limited to 1 MiB; add the sources and subscriptions through the API instead." -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- $wrong = append $wrong "ingress.hosts: set at least one host." -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- $wrong = append $wrong "httpRoute.parentRefs: set at least one Gateway." -}}
{{- end -}}
{{- with $v.worker.autoscaling -}}
{{- if and (eq .mode "keda") (not .keda.serverAddress) -}}
{{- $wrong = append $wrong "worker.autoscaling.keda.serverAddress: set it to the URL of Prometheus." -}}
{{- end -}}
{{- if lt (int .maxReplicas) (int .minReplicas) -}}
{{- $wrong = append $wrong "worker.autoscaling.maxReplicas: must be at least minReplicas." -}}
{{- end -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n\nThe values are not valid:\n  - %s\n" (join "\n  - " $wrong)) -}}
{{- end -}}
{{- end -}}
