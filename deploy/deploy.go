// Package deploy holds the configuration that Hearth gives to programs of others, as templates: the same for `hearth up` and
// for a node of a cluster.
package deploy

import _ "embed"

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
