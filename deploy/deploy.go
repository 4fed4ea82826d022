// Package deploy holds what Hearth is deployed with: on a cluster the objects of base, which overlays and the Helm chart vary; for
// `hearth up` and for a node of a test cluster the configuration that is given to programs of others, as templates.
package deploy

import "embed"

// Containerd is the template (text/template) of containerd's configuration, version 3.
//
//go:embed containerd/config.toml.tmpl
var Containerd string

// CNI is the template of the network configuration: a veth pair per sandbox, addresses from a local range.
//
//go:embed cni/10-hearth.conflist.tmpl
var CNI string

// Registry is the template of the private registry's configuration.
//
//go:embed registry/config.yaml.tmpl
var Registry string

// Seen is what shows how Hearth does: grafana/*.json are dashboards, prometheus/alerts.yaml are rules, and prometheus/prometheus.yaml
// says what is to be scraped.
//
//go:embed grafana prometheus
var Seen embed.FS

//go:embed base crds uninstall
var manifests embed.FS
