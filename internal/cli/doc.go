// Package cli is the hearth command: it brings a deployment up on this machine and takes it down, and deploys, calls, shows and
// deletes Functions. It talks to the daemons over their sockets, as any other program may, and keeps nothing itself.
package cli
