{{- define "disagg.selectorLabels" -}}
app.kubernetes.io/name: disagg
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Labels of every object; `component` is the name after "RELEASE-". */}}
{{- define "disagg.labels" -}}
{{ include "disagg.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: disagg
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- if has .component (list "prefill" "decode") }}
llm-d.ai/role: {{ .component }}
{{- else if eq .component "unified" }}
llm-d.ai/role: both
{{- end }}
{{- end }}

{{- define "disagg.metadata" -}}
name: {{ .root.Release.Name }}-{{ .component }}
namespace: {{ .root.Release.Namespace | quote }}
labels: {{- include "disagg.labels" . | nindent 2 }}
{{- end }}

{{/* All pods that carry KV, or ("router" added) all that serve. */}}
{{- define "disagg.podsOf" -}}
matchLabels:
  app.kubernetes.io/name: disagg
  app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: {{ toJson .components }}}
{{- end }}

{{- define "disagg.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "disagg.keysSecret" -}}
{{ .Values.transport.existingSecret | default (printf "%s-keys" .Release.Name) }}
{{- end }}

{{/* Secret with API keys, or nothing where anybody may call. */}}
{{- define "disagg.apiKeysSecret" -}}
{{- if .Values.auth.existingSecret }}{{ .Values.auth.existingSecret }}
{{- else if .Values.auth.apiKeys }}{{ .Release.Name }}-api-keys
{{- end }}
{{- end }}

{{- define "disagg.modelScheme" -}}
{{ (splitList "://" .Values.modelArtifacts.uri) | first }}
{{- end }}

{{/* What follows the scheme: nothing, ORG/NAME or CLAIM/PATH. */}}
{{- define "disagg.modelPath" -}}
{{ (splitList "://" .Values.modelArtifacts.uri) | rest | join "://" }}
{{- end }}

{{- define "disagg.claim" -}}
{{- if eq (include "disagg.modelScheme" .) "hf" }}{{ .Release.Name }}-models
{{- else if eq (include "disagg.modelScheme" .) "pvc" }}{{ splitList "/" (include "disagg.modelPath" .) | first }}
{{- end }}
{{- end }}

{{/* CLAIM/PATH's PATH. */}}
{{- define "disagg.pathInClaim" -}}
{{ splitList "/" (include "disagg.modelPath" .) | rest | join "/" }}
{{- end }}

{{/* The model's name in the API; nothing where it is that of the image's model. */}}
{{- define "disagg.servedName" -}}
{{- if .Values.modelArtifacts.name }}{{ .Values.modelArtifacts.name }}
{{- else if eq (include "disagg.modelScheme" .) "hf" }}{{ include "disagg.modelPath" . }}
{{- else if eq (include "disagg.modelScheme" .) "pvc" }}{{ include "disagg.pathInClaim" . }}
{{- end }}
{{- end }}

{{- define "disagg.modelArgs" -}}
{{- if eq (include "disagg.modelScheme" .) "hf" }}
- --model={{ include "disagg.modelPath" . }}
{{- else if eq (include "disagg.modelScheme" .) "pvc" }}
- {{ printf "--model=%s/%s" .Values.modelArtifacts.mountPath (include "disagg.pathInClaim" .) | quote }}
{{- end }}
{{- with include "disagg.servedName" . }}
- {{ printf "--served-model-name=%s" . | quote }}
{{- end }}
{{- end }}

{{- define "disagg.routerArgs" -}}
- router
- --host=*
- --port=8000
- --discover={{ .Release.Name }}
- --discover-namespace={{ .Release.Namespace }}
- --transport-keys=/etc/disagg/keys
- --peer-bind=tcp://*:5602
- --drain-seconds={{ .Values.router.drainSeconds }}
{{- include "disagg.modelArgs" . }}
{{- if include "disagg.apiKeysSecret" . }}
- --api-key-file=/etc/disagg/api-keys/keys
{{- end }}
{{- if .Values.router.tls.secretName }}
- --tls-certificate=/etc/disagg/tls/tls.crt
- --tls-key=/etc/disagg/tls/tls.key
{{- end }}
{{- range .Values.router.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "disagg.workerArgs" -}}
- worker
- --role={{ .component }}
- --worker-id=$(POD_NAME)
- --pod-uid=$(POD_UID)
- --control=tcp://*:5600
- --advertise-host=$(POD_IP)
- --http-host=*
- --http-port=8080
- --transport-keys=/etc/disagg/keys
- --drain-seconds={{ .values.drainSeconds }}
- --tensor-parallel-size={{ .values.parallelism.tensor }}
{{- include "disagg.modelArgs" .root }}
{{- if gt (int .values.nodesPerWorker) 1 }}
- --num-nodes=$(LWS_GROUP_SIZE)
- --node-rank=$(LWS_WORKER_INDEX)
- --leader-address=$(LWS_LEADER_ADDRESS)
{{- end }}
{{- range .values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* The container's resources, with the devices that the worker's size asks for. */}}
{{- define "disagg.resources" -}}
{{- $resources := deepCopy .values.resources }}
{{- if and .root.Values.accelerator.resource (ne .component "router") }}
{{- $devices := div .values.parallelism.tensor .values.nodesPerWorker }}
{{- $limits := merge (dict .root.Values.accelerator.resource $devices) (default dict $resources.limits) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* The pod of every part: root, component, values (of the component), args. */}}
{{- define "disagg.pod" -}}
{{- $isRouter := eq .component "router" }}
{{- $scheme := include "disagg.modelScheme" .root }}
{{- $claim := include "disagg.claim" .root }}
{{- $apiKeys := and $isRouter (include "disagg.apiKeysSecret" .root) }}
{{- $tls := and $isRouter .root.Values.router.tls.secretName }}
metadata:
  labels: {{- include "disagg.labels" . | nindent 4 }}
spec:
  serviceAccountName: {{ .root.Release.Name }}-{{ ternary "router" "worker" $isRouter }}
  automountServiceAccountToken: {{ $isRouter }}
  # A release called "disagg" would get DISAGG_ROUTER_PORT, which is a flag of ours.
  enableServiceLinks: false
  # What runs may end; the rest is for the processes themselves and, of a router, for clients to turn away.
  terminationGracePeriodSeconds: {{ add .values.drainSeconds (ternary 20 15 $isRouter) }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .root.Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .root.Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - labelSelector:
        matchLabels: {{- include "disagg.selectorLabels" $ | nindent 10 }}
      {{- toYaml . | nindent 6 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ ternary "router" "worker" $isRouter }}
      image: {{ include "disagg.image" .root | quote }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      # The sentence in which a wrong configuration ends stands in the pod's status too.
      terminationMessagePolicy: FallbackToLogsOnError
      args: {{- .args | nindent 8 }}
      env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        - name: POD_UID
          valueFrom: {fieldRef: {fieldPath: metadata.uid}}
        {{- if eq $scheme "hf" }}
        - {name: HF_HOME, value: {{ .root.Values.modelArtifacts.mountPath | quote }}}
        - {name: HF_HUB_CACHE, value: "{{ .root.Values.modelArtifacts.mountPath }}/hub"}
        {{- with .root.Values.modelArtifacts.authSecretName }}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: HF_TOKEN}}
        {{- end }}
        {{- else }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- end }}
        {{- with .values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http, containerPort: {{ ternary 8000 8080 $isRouter }}}
        - {name: control, containerPort: {{ ternary 5602 5600 $isRouter }}}
      {{- with include "disagg.resources" . }}
      resources: {{- . | nindent 8 }}
      {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          {{- with .values.capabilities }}
          add: {{- toYaml . | nindent 12 }}
          {{- end }}
      {{- $probe := printf "port: http, scheme: %s" (ternary "HTTPS" "HTTP" (not (empty $tls))) }}
      startupProbe:
        httpGet: {path: {{ ternary "/live" "/health" $isRouter }}, {{ $probe }}}
        periodSeconds: 1
        failureThreshold: {{ .values.startupSeconds }}
      readinessProbe:
        httpGet: {path: /health, {{ $probe }}}
        periodSeconds: 2
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /live, {{ $probe }}}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      lifecycle:
        preStop:
          exec:
            command: [disagg, drain, "{{ ternary (ternary "https" "http" (not (empty $tls))) "http" $isRouter }}://127.0.0.1:{{ ternary 8000 8080 $isRouter }}"]
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: keys, mountPath: /etc/disagg/keys, readOnly: true}
        {{- if $apiKeys }}
        - {name: api-keys, mountPath: /etc/disagg/api-keys, readOnly: true}
        {{- end }}
        {{- if $tls }}
        - {name: tls, mountPath: /etc/disagg/tls, readOnly: true}
        {{- end }}
        {{- if $claim }}
        - {name: models, mountPath: {{ .root.Values.modelArtifacts.mountPath | quote }}, readOnly: {{ eq $scheme "pvc" }}}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.shmSize }}}
    - name: keys
      secret: {secretName: {{ include "disagg.keysSecret" .root | quote }}, defaultMode: 0440}
    {{- if $apiKeys }}
    - name: api-keys
      secret: {secretName: {{ $apiKeys | quote }}, defaultMode: 0440}
    {{- end }}
    {{- if $tls }}
    - name: tls
      secret: {secretName: {{ $tls | quote }}, defaultMode: 0440}
    {{- end }}
    {{- if $claim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ $claim | quote }}, readOnly: {{ eq $scheme "pvc" }}}
    {{- end }}
{{- end }}

{{- define "disagg.deployment" -}}
apiVersion: apps/v1
kind: Deployment
metadata: {{- include "disagg.metadata" . | nindent 2 }}
spec:
  replicas: {{ .values.replicas }}
  selector:
    matchLabels: {{- include "disagg.selectorLabels" . | nindent 6 }}
  strategy:
    type: RollingUpdate
    rollingUpdate: {{- toYaml .values.strategy | nindent 6 }}
  template: {{- include "disagg.pod" . | nindent 4 }}
{{- end }}

{{- define "disagg.leaderWorkerSet" -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata: {{- include "disagg.metadata" . | nindent 2 }}
spec:
  replicas: {{ .values.replicas }}
  rolloutStrategy:
    type: RollingUpdate
    rollingUpdateConfiguration: {{- toYaml .values.strategy | nindent 6 }}
  leaderWorkerTemplate:
    size: {{ .values.nodesPerWorker }}
    restartPolicy: RecreateGroupOnPodRestart
    workerTemplate: {{- include "disagg.pod" . | nindent 6 }}
{{- end }}
