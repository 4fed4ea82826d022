// Package daemon is what every program of Hearth that runs for long has in common: flags that may also come from the
// environment and from a file, logging, metrics, health, profiles, RPC over Unix sockets and over TLS, and an orderly end.
//
// A program's main only says os.Exit(daemon.Main(daemon.Service{...})). The package knows nothing of what the programs do.
package daemon
