// Package api holds the RPC definitions of Hearth; the generated code is in api/v1alpha1. Regenerate with `make generate`,
// which needs protoc (Debian: protobuf-compiler); the plug-ins are pinned in go.mod.
package api

//go:generate ./generate.sh
