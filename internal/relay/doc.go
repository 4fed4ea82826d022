// Package relay is what every HTTP hop of Hearth does alike: the gateway, the sidecar before each Function, and calls between the
// daemons. A request goes on as it came, less what concerns one connection only (RFC 9110, 7.6.1); a hop's own answers all have one
// form.
//
// It uses the standard library alone, because the sidecar, of which there is one in every Instance, is built of it.
package relay
