package stack_test

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// TestSidecars has an image and code served through sidecars: from the pool, warm, thawed, and to zero again, with logs.
func TestSidecars(t *testing.T) {
	d := start(t, func(c *stack.Config) { c.Sidecar = true })
	d.applyNative(t, 1)
	functions := []tenant{{name: "image", secret: "i-5519", keeps: true}, {name: "code", secret: "c-3306", runtime: native, keeps: true}}
	for _, f := range functions {
		d.deployTenant(t, f)
	}
	d.settles(t)
	for _, f := range functions {
		t.Run(f.name, func(t *testing.T) { d.servesBySidecar(t, f) })
	}
	d.settles(t)
}

func (d *deployment) servesBySidecar(t *testing.T, f tenant) {
	ctx, cancel := context.WithTimeout(t.Context(), longStart)
	defer cancel()
	pooled, err := d.instances(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	warm := map[string]bool{}
	for _, i := range pooled {
		warm[i.GetId()] = i.GetState() == hearthv1.State_STATE_WARM && i.GetRuntime() == f.runtime
	}
	ask := func() {
		t.Helper()
		if err := f.identify(ctx, d.web.client, d.web.url(f.name)); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	first := d.only(t, f.name)
	if !warm[first.GetId()] || !strings.HasSuffix(first.GetAddress(), ":8012") {
		t.Errorf("it was served by %v, and warm were %v", first, warm)
	}
	ask()
	line := "a line of " + f.name
	if _, err := d.web.get(ctx, f.name, "/log?line="+url.QueryEscape(line)); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(d.logs(t, ctx, f.name), first.GetId()+" "+line+"\n") {
		if nap(ctx, 20*time.Millisecond); ctx.Err() != nil {
			t.Fatalf("its log is %q", d.logs(t, t.Context(), f.name))
		}
	}
	for range 2 {
		for d.only(t, f.name).GetState() != hearthv1.State_STATE_FROZEN {
			if nap(ctx, 20*time.Millisecond); ctx.Err() != nil {
				t.Fatalf("it is not frozen: %v", d.only(t, f.name))
			}
		}
		ask()
		if again := d.only(t, f.name); again.GetId() != first.GetId() {
			t.Errorf("after it was frozen it was served by %v", again)
		}
	}
	d.toZero(t, f.name)
}

// logs are what a Function's Instances have written, each line with its Instance.
func (d *deployment) logs(t *testing.T, ctx context.Context, function string) string {
	t.Helper()
	stream, err := d.node.Logs(ctx, connect.NewRequest(&hearthv1.LogsRequest{Function: function}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var text strings.Builder
	for stream.Receive() {
		fmt.Fprintf(&text, "%s %s\n", stream.Msg().GetInstanceId(), stream.Msg().GetLine())
	}
	return text.String()
}
