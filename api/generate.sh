#!/usr/bin/env bash
# Generates api/v1alpha1 from api/hearth/v1alpha1/*.proto, and deploy/crds and deep copies from the types in api/crd/v1alpha1.
set -euo pipefail
cd "$(dirname "$0")"
bin=$(mktemp -d); trap 'rm -rf "$bin"' EXIT
go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
module=github.com/hearth-serverless/hearth/api
PATH=$bin:$PATH protoc -I . --go_out=. --go_opt=module=$module --connect-go_out=. --connect-go_opt=module=$module \
  hearth/v1alpha1/*.proto
go tool controller-gen object crd paths=./crd/... output:crd:dir=../deploy/crds
