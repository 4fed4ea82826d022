package pool_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

func imported(name string, starts int64, total time.Duration, functions ...string) *hearthv1.ModuleImports {
	return &hearthv1.ModuleImports{Name: name, InImage: true, Starts: starts, Functions: functions, Total: durationpb.New(total)}
}

// TestImportsOfAllNodes adds up what nodes say of what is there now.
func TestImportsOfAllNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := []*fakeNode{newFakeNode(t, "a"), newFakeNode(t, "b"), newFakeNode(t, "c")}
		m := start(t, pool.Config{Nodes: map[string]pool.Node{"a": nodes[0], "b": nodes[1], "c": nodes[2]}, Store: newMemory(), PoolSize: 1})
		defer m.stop()
		time.Sleep(2 * time.Second)
		m.applyRuntime("python", 0)
		list := func(runtime string) (*hearthv1.ListImportsResponse, error) {
			r, err := m.ListImports(t.Context(), connect.NewRequest(&hearthv1.ListImportsRequest{Runtime: runtime}))
			if err != nil {
				return nil, err
			}
			return r.Msg, nil
		}
		nodes[0].on(func() {
			nodes[0].imports = &hearthv1.ListImportsResponse{Runtimes: []*hearthv1.RuntimeImports{
				{Runtime: "python", Generation: 1, Starts: 2, Functions: []string{"a", "b"}, Modules: []*hearthv1.ModuleImports{imported("numpy", 2, time.Second, "a", "b"), imported("csv", 1, time.Second, "a")}},
				{Runtime: "deleted", Generation: 1, Starts: 9},
			}}
		})
		nodes[1].on(func() {
			nodes[1].imports = &hearthv1.ListImportsResponse{Runtimes: []*hearthv1.RuntimeImports{
				{Runtime: "python", Generation: 1, Starts: 1, Functions: []string{"b"}, Modules: []*hearthv1.ModuleImports{imported("csv", 1, 2*time.Second, "b")}},
			}}
		})
		nodes[2].on(func() {
			nodes[2].imports = &hearthv1.ListImportsResponse{Runtimes: []*hearthv1.RuntimeImports{{Runtime: "python", Generation: 7, Starts: 9}}}
		})
		got, err := list("")
		if err != nil {
			t.Fatal(err)
		}
		want := &hearthv1.ListImportsResponse{Runtimes: []*hearthv1.RuntimeImports{{Runtime: "python", Generation: 1, Starts: 3, Functions: []string{"a", "b"}, Modules: []*hearthv1.ModuleImports{
			imported("csv", 2, 3*time.Second, "a", "b"), imported("numpy", 2, time.Second, "a", "b"),
		}}}}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		nodes[0].on(func() {
			nodes[0].before = func(call, _ string) error {
				if call == "imports" {
					return code(connect.CodeUnavailable, "%w", errors.New("refused"))
				}
				return nil
			}
		})
		nodes[2].on(func() { nodes[2].dead = true })
		if got, err := list("python"); err != nil || got.GetSilent() != 2 || got.GetRuntimes()[0].GetStarts() != 1 {
			t.Errorf("with one node that answers: %v, %v", got, err)
		}
		nodes[2].on(func() { nodes[2].dead = false })
		if _, err := list("other"); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("of no Runtime: %v", err)
		}
	})
}

// TestLanguageIsTold: a Runtime's status has what its loaders say that they are.
func TestLanguageIsTold(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.applyRuntime("python", 1)
		time.Sleep(3 * time.Second)
		if got := m.runtimeStatus("python").GetStatus().GetLanguage(); got != "python 3.11.2" {
			t.Errorf("it is %q", got)
		}
		r := m.runtimeStatus("python")
		r.Env, r.Warm, r.Status = map[string]string{"A": "b"}, 0, nil
		if _, err := m.ApplyRuntime(t.Context(), connect.NewRequest(&hearthv1.ApplyRuntimeRequest{Runtime: r})); err != nil {
			t.Fatal(err)
		}
		if got := m.runtimeStatus("python").GetStatus().GetLanguage(); got != "" {
			t.Errorf("of what has not booted yet it is %q", got)
		}
	})
}
