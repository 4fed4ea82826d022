{{- /* The reference of one of Hearth's images: (list $ "gateway"). A digest goes before the tag. */ -}}
{{- define "hearth.image" -}}
{{- $root := index . 0 }}{{ $name := index . 1 }}{{ $image := $root.Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}hearth/{{ $name }}
{{- with get $image.digests $name }}@{{ . }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end -}}
