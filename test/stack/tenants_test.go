package stack_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/internal/codepack"
	"github.com/hearth-serverless/hearth/registry"
)

// tenant has a Function that knows whose it is: its code, environment and secret are like nobody else's, and so is its answer.
type tenant struct {
	name, secret string
	// runtime that its code runs in; empty if it is an image.
	runtime string
	// keeps says that its Instances are frozen as soon as nobody asks, and thawed for whoever does.
	keeps bool
}

// identity is what its Function answers and no other can.
func (f tenant) identity() string {
	return fmt.Sprintf("code of %s env of %s %s", f.name, f.name, f.secret)
}

// native is the Runtime of the tests: it waits for no interpreter.
const native = "native"

// tenants deploys the Functions of the drills: images, and code for a Runtime of which some Instances wait.
func (d *deployment) tenants(t *testing.T) []tenant {
	t.Helper()
	d.applyNative(t, 2)
	table := []tenant{
		{name: "left", secret: "l-7301"},
		{name: "red", secret: "c-4117", runtime: native},
		{name: "right", secret: "r-2288"},
		{name: "blue", secret: "c-8630", runtime: native},
		{name: "kept-image", secret: "k-9154", keeps: true},
		{name: "kept-code", secret: "k-0562", runtime: native, keeps: true},
	}
	for _, f := range table {
		d.deployTenant(t, f)
	}
	return table
}

// applyNative makes the Runtime, of which so many Instances are booted ahead, and waits for them.
func (d *deployment) applyNative(t *testing.T, warm int32) {
	t.Helper()
	ref := d.status.Registry + "/runtime-native:1"
	if _, err := images.Push(t.Context(), shop.native, ref); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := d.runtimes.ApplyRuntime(ctx, connect.NewRequest(&hearthv1.ApplyRuntimeRequest{
		Runtime: &hearthv1.Runtime{Name: native, Image: ref, Warm: warm}, Prepare: true,
	}))
	if err != nil {
		t.Fatalf("apply the runtime: %v", err)
	}
	d.booted[native] = int(warm)
}

func (d *deployment) deployTenant(t *testing.T, f tenant, change ...func(*hearthv1.FunctionSpec)) {
	t.Helper()
	image, code := "", (*hearthv1.Code)(nil)
	if f.runtime == "" {
		image = push(t, d.status.Registry, "tenant/"+f.name, programImage(t, shop.tenant, "tenant", file("whose", "code of "+f.name)))
	} else {
		code = &hearthv1.Code{Package: d.pushCode(t, f.name, shop.tenant), Handler: "main"}
	}
	own := func(s *hearthv1.FunctionSpec) {
		s.Runtime, s.Code = f.runtime, code
		s.Env = map[string]string{"WHOSE": "env of " + f.name}
		s.Secrets = map[string][]byte{"whose": []byte(f.secret)}
		s.Scaling.Frozen = -1
		if f.keeps {
			s.Scaling = &hearthv1.Scaling{Frozen: 1, Window: durationpb.New(time.Second), Grace: durationpb.New(0)}
		}
	}
	d.mustDeploy(t, f.name, image, append([]func(*hearthv1.FunctionSpec){own}, change...)...)
}

// pushCode packs a program for a tenant as `hearth deploy` does, and pushes it.
func (d *deployment) pushCode(t *testing.T, name, program string) string {
	t.Helper()
	dir := t.TempDir()
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string][]byte{"main": text, "whose": []byte("code of " + name)} {
		if err := os.WriteFile(filepath.Join(dir, file), content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := codepack.Open(dir, codepack.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	var done atomic.Int64
	packed, err := tree.Pack(t.Context(), native, "main", &done)
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ref, err := packed.Push(t.Context(), client, d.status.Registry+"/code/"+name, &done)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// errStranger says that a Function answered for another.
var errStranger = errors.New("another function answered")

// identify has whoever is at a URL say who it is.
func (f tenant) identify(ctx context.Context, client *http.Client, url string) error {
	a, err := fetch(ctx, client, url+"/who")
	if err != nil {
		return err
	}
	if a.code != http.StatusOK {
		return fmt.Errorf("%w: %d %s", errAnswer, a.code, a.body)
	}
	if a.body != f.identity() {
		return fmt.Errorf("%w: %s has the answer %q", errStranger, f.name, a.body)
	}
	return nil
}
