# Hearth. `make` alone tells what there is.
SHELL   := /bin/bash
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -X github.com/hearth-serverless/hearth/internal/daemon.version=$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help build tools peers kubernetes images test e2e cluster cluster-down demo lint generate clean go

help: ## show this list
	@echo "Hearth $(VERSION): make TARGET"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

build: go ## compile Hearth's commands into bin/
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/... ./runtimes/launcher ./runtimes/pause
	@bin/bench images --archives bin pause >/dev/null

tools: go ## compile containerd, runc, CNI plugins and the registry into .cache (some minutes once, then at once)
	@tools/build >/dev/null

peers: go ## compile the snapshotters that benchmarks compare with (SOCI, stargz) into .cache; bench does it when it needs them
	@tools/build peers >/dev/null

kubernetes: go ## compile a Kubernetes control plane, kubelet and kubectl into .cache (some 15 minutes once); make cluster does it when it needs them
	@tools/build kubernetes >/dev/null

images: build tools ## make all sample images in .cache (`bin/bench images NAME` for one); needs root and a Debian mirror
	bin/bench images

test: build tools ## every test, under the race detector; those of the node want root; TESTFLAGS='-run X' narrows it
	bin/bench images runtime-python runtime-native >/dev/null
	go test -race -timeout 20m $(TESTFLAGS) ./test/... ./...

e2e: build tools kubernetes ## tests on a real Kubernetes cluster of two nodes, as root; TESTFLAGS='-run X' narrows it
	HEARTH_E2E=1 go test -timeout 40m -v $(TESTFLAGS) ./internal/kube ./test/cluster ./test/e2e
	HEARTH_E2E=1 go test -timeout 15m -v $(TESTFLAGS) ./test/scale

cluster: tools kubernetes ## start a Kubernetes cluster on this machine, as root: NODES=N (2), CLUSTER=FOLDER (/tmp/hearth-cluster); docs/CLUSTER.md
	@go run ./test/cluster/ctl $(if $(CLUSTER),--dir $(CLUSTER)) $(if $(NODES),--nodes $(NODES)) up

cluster-down: go ## end it and remove all of it
	@go run ./test/cluster/ctl $(if $(CLUSTER),--dir $(CLUSTER)) down

demo: build tools ## start a function cold, from the pool and warm on this machine, as root; JSON=FILE keeps the rows
	bin/bench demo $(if $(JSON),--json $(JSON))

lint: go ## golangci-lint if it is installed, otherwise go vet
	@if command -v golangci-lint >/dev/null; then golangci-lint run; else echo "golangci-lint is not installed: go vet only"; go vet ./...; fi

generate: go ## write generated code again
	go generate ./...

clean: ## remove bin/ and .cache/: the next make tools and make images start from nothing
	rm -rf bin .cache

go:
	@command -v go >/dev/null || { echo "Go is not on the PATH: install version $$(sed -n 's/^go //p' go.mod) or newer from https://go.dev/dl" >&2; exit 1; }
