// Package kube is Hearth on Kubernetes: it keeps poolmanager's pool and the API server's objects in step. It alone speaks to an API server.
//
// The custom resources are what users want; the pool does it, and is never more than told: controllers apply what changed, and write
// what came of it into the status when that differs. Nothing has a finalizer: an object that is gone is seen as not found, and what was
// made of it is owned by it, so that the API server's garbage collection takes it too, in any order, with nobody's help.
package kube
