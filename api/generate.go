// Package api holds the RPC definitions of Hearth, with their generated code in api/v1alpha1, and its custom resources in
// api/crd/v1alpha1, with their schemas in deploy/crds. Regenerate with `make generate`, which needs protoc (Debian:
// protobuf-compiler); the plug-ins and controller-gen are pinned in go.mod.
package api

//go:generate ./generate.sh
