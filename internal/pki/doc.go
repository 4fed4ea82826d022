// Package pki is who the daemons are to each other on a network: a certificate authority of Hearth's own, certificates for identities,
// when either is renewed, and TLS from a folder of files that change while it is used.
//
// Nothing here keeps time or state: what is to be renewed follows from what certificates say and from the time that is passed in, so any
// number of processes come to the same decision.
package pki

// Identities, which are DNS names that certificates bear. They name a part and no machine: where it is, is said elsewhere.
const (
	Nodeagent   = "nodeagent.hearth.dev"
	Poolmanager = "poolmanager.hearth.dev"
	Gateway     = "gateway.hearth.dev"
	Admin       = "admin.hearth.dev"
)

// Names of files in a folder, which are also those of keys in a Secret.
const (
	AuthorityFile   = "ca.crt"
	CertificateFile = "tls.crt"
	KeyFile         = "tls.key"
)
