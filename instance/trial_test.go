package instance_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func tried() *hearthv1.Revision {
	return &hearthv1.Revision{Image: "example.org/tried:1", Port: 8080}
}

// TestTrial starts an image for nobody: whoever watches the node hears nothing of it, and nothing of it is left.
func TestTrial(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	if err := create(e, "pooled"); err != nil {
		t.Fatal(err)
	}
	if _, err := activate(e, "pooled", "claim", 7, time.Minute); err != nil { // a trial is of no term
		t.Fatal(err)
	}
	refused := errors.New("answered 503")
	for _, want := range []error{nil, refused} {
		asked := ""
		ready, err := e.Try(t.Context(), tried(), func(_ context.Context, address string) error {
			asked = address
			if all := list(t, e); len(all) != 1 || all["pooled"] == nil {
				t.Errorf("the node tells of %v", all)
			}
			return want
		})
		if !errors.Is(err, want) || asked == "" || ready <= 0 {
			t.Errorf("ready after %s at %q, error %v", ready, asked, err)
		}
	}
	if f.started != 3 || len(f.containers) != 1 || len(f.sandboxes) != 1 {
		t.Errorf("%d starts, and left are %s", f.started, f.left())
	}
	ref, dgst, ok := e.Named("chain")
	if !ok || dgst != digest.FromString("image") || ref != "example.org/hello:1" && ref != "example.org/tried:1" {
		t.Errorf("image is called %q, %s, %v", ref, dgst, ok)
	}
	if chain, err := e.Lookup(t.Context(), "example.org/tried:1"); err != nil || chain != "chain" {
		t.Errorf("chain ID %q, error %v", chain, err)
	}
	if _, err := e.Lookup(t.Context(), "absent"); !errdefs.IsNotFound(err) || f.pulls != 2 {
		t.Errorf("error %v after %d pulls", err, f.pulls)
	}
	if chain, err := e.Pull(t.Context(), "absent"); err != nil || chain != "chain" || f.pulls != 3 {
		t.Errorf("chain ID %q, error %v after %d pulls", chain, err, f.pulls)
	}
	if _, _, ok := e.Named("another chain"); ok {
		t.Error("an image is named that is not there")
	}
}

func TestTrialThatCannotBe(t *testing.T) {
	unwanted := func(context.Context, string) error { t.Error("it serves"); return nil }
	t.Run("no image", func(t *testing.T) {
		what := tried()
		what.Image = "not a reference"
		if _, err := run(t, newFake(t)).Try(t.Context(), what, unwanted); !errdefs.IsInvalidArgument(err) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("kubelet", func(t *testing.T) {
		f := newFake(t)
		f.config.Kubelet = "hearth"
		if _, err := run(t, f).Try(t.Context(), tried(), unwanted); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("start fails", func(t *testing.T) {
		f := newFake(t)
		broken := errors.New("no such program")
		f.onLaunch = func(context.Context) error { return broken }
		_, err := run(t, f).Try(t.Context(), tried(), unwanted)
		if !errors.Is(err, broken) || len(f.sandboxes) != 0 {
			t.Errorf("error %v, left %s", err, f.left())
		}
	})
}
