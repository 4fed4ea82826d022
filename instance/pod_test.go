package instance_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

// shared is a Revision of a Function that shares pods with those of its group.
func shared(function, tenant, group string) *hearthv1.Revision {
	r := revision()
	r.Name, r.Function, r.Tenant, r.Group = function+"-00001", function, tenant, group
	return r
}

// join makes a worker.
func join(e *instance.Engine, id, pod, tenant, group string) error {
	_, err := e.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{
		Id: id, Pod: pod, Tenant: tenant, Group: group,
	}))
	return err
}

// serve has an Instance serve a Revision.
func serve(e *instance.Engine, id string, r *hearthv1.Revision) (*hearthv1.Instance, error) {
	answer, err := e.Activate(context.Background(), connect.NewRequest(&hearthv1.ActivateRequest{
		InstanceId: id, Revision: r, Claim: &hearthv1.Claim{Id: "claim-" + id, Epoch: 1},
	}))
	if err != nil {
		return nil, err
	}
	return answer.Msg.Instance, nil
}

// startShared makes Instances of one pod serve, the first being the one that it is made for.
func startShared(t *testing.T, e *instance.Engine, ids ...string) map[string]*hearthv1.Instance {
	t.Helper()
	all := map[string]*hearthv1.Instance{}
	for n, id := range ids {
		err := create(e, ids[0])
		if n > 0 {
			err = join(e, id, ids[0], "acme", "low")
		}
		if err == nil {
			all[id], err = serve(e, id, shared("fn-"+id, "acme", "low"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func TestWorkersShareAPod(t *testing.T) {
	f := newFake(t)
	metrics := prometheus.NewRegistry()
	f.config.Registerer = metrics
	e := run(t, f)
	all := startShared(t, e, "a", "b", "c")
	if got := f.left(); !strings.HasPrefix(got, "1 sandboxes, 3 containers") {
		t.Errorf("there are %s", got)
	}
	want := `# HELP hearth_instance_cpu_seconds_total Processor time that an instance has taken.
# TYPE hearth_instance_cpu_seconds_total counter
hearth_instance_cpu_seconds_total{function="fn-a",instance="a",pod="a"} 1.5
hearth_instance_cpu_seconds_total{function="fn-b",instance="b",pod="a"} 1.5
hearth_instance_cpu_seconds_total{function="fn-c",instance="c",pod="a"} 1.5
# HELP hearth_instance_memory_bytes Memory that an instance uses, without files that it has only read.
# TYPE hearth_instance_memory_bytes gauge
hearth_instance_memory_bytes{function="fn-a",instance="a",pod="a"} 2.097152e+06
hearth_instance_memory_bytes{function="fn-b",instance="b",pod="a"} 2.097152e+06
hearth_instance_memory_bytes{function="fn-c",instance="c",pod="a"} 2.097152e+06
`
	if err := testutil.GatherAndCompare(metrics, strings.NewReader(want), "hearth_instance_cpu_seconds_total", "hearth_instance_memory_bytes"); err != nil {
		t.Error(err)
	}
	host, seen := "", map[string]bool{}
	for id, i := range all {
		at := strings.Split(i.Address, ":")
		if i.Pod != "a" || i.Tenant != "acme" || i.Group != "low" || seen[i.Address] || host != "" && host != at[0] || i.State != hearthv1.State_STATE_SERVING {
			t.Errorf("%s is %v", id, i)
		}
		seen[i.Address], host = true, at[0]
	}
	// The one that the pod was made for goes like any other.
	for n, id := range []string{"a", "c", "b"} {
		if err := discard(e, id, 1); err != nil {
			t.Fatal(err)
		}
		if err := create(e, "a"); n < 2 && connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("the pod's name for another: %v", err)
		}
		if got := f.left(); n < 2 && !strings.HasPrefix(got, fmt.Sprintf("1 sandboxes, %d containers", 2-n)) {
			t.Errorf("after %s: %s", id, got)
		}
	}
	if err := discard(e, "a", 1); err != nil { // the one made last, by that name
		t.Fatal(err)
	}
	if got := f.left(); got != nothing {
		t.Errorf("left: %s", got)
	}
}

// TestPodsAreOneGroups: whatever comes first says whose a pod is, and nobody else gets into it.
func TestPodsAreOneGroups(t *testing.T) {
	for name, c := range map[string]struct {
		first  func(e *instance.Engine) error
		second func(e *instance.Engine) error
		want   connect.Code
	}{
		"another tenant's worker": {
			func(e *instance.Engine) error { _, err := serve(e, "a", shared("x", "acme", "low")); return err },
			func(e *instance.Engine) error { return join(e, "b", "a", "evil", "low") }, connect.CodeFailedPrecondition},
		"nobody's worker": {
			func(e *instance.Engine) error { _, err := serve(e, "a", shared("x", "acme", "low")); return err },
			func(e *instance.Engine) error { return join(e, "b", "a", "", "low") }, connect.CodeFailedPrecondition},
		"another group's worker": {
			func(e *instance.Engine) error { _, err := serve(e, "a", shared("x", "acme", "low")); return err },
			func(e *instance.Engine) error { return join(e, "b", "a", "acme", "high") }, connect.CodeFailedPrecondition},
		"a worker beside one that is alone": {
			func(e *instance.Engine) error { _, err := serve(e, "a", revision()); return err },
			func(e *instance.Engine) error { return join(e, "b", "a", "acme", "low") }, connect.CodeFailedPrecondition},
		"another tenant's claim of a worker": {
			func(e *instance.Engine) error { return join(e, "b", "a", "acme", "low") },
			func(e *instance.Engine) error { _, err := serve(e, "b", shared("x", "evil", "low")); return err }, connect.CodeFailedPrecondition},
		"a claim of a worker for one that is alone": {
			func(e *instance.Engine) error { return join(e, "b", "a", "acme", "low") },
			func(e *instance.Engine) error { _, err := serve(e, "b", revision()); return err }, connect.CodeFailedPrecondition},
		"another's claim of what workers are beside": {
			func(e *instance.Engine) error { return join(e, "b", "a", "acme", "low") },
			func(e *instance.Engine) error { _, err := serve(e, "a", shared("x", "evil", "low")); return err }, connect.CodeFailedPrecondition},
		"a pod that is not there": {
			func(*instance.Engine) error { return nil },
			func(e *instance.Engine) error { return join(e, "b", "none", "acme", "low") }, connect.CodeFailedPrecondition},
		"a pod without a group": {
			func(*instance.Engine) error { return nil },
			func(e *instance.Engine) error { return join(e, "b", "a", "", "") }, connect.CodeInvalidArgument},
		"a group that is no name": {
			func(*instance.Engine) error { return nil },
			func(e *instance.Engine) error { _, err := serve(e, "a", shared("x", "../acme", "low")); return err }, connect.CodeInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			e := run(t, f)
			if err := create(e, "a"); err != nil {
				t.Fatal(err)
			}
			if err := c.first(e); err != nil {
				t.Fatal(err)
			}
			wantCode(t, c.second(e), c.want)
		})
	}
}

// TestWorkersEndAlone: what happens to one happens to no other, and its address is never another's.
func TestWorkersEndAlone(t *testing.T) {
	f := newFake(t)
	root := t.TempDir()
	e, stop := runIn(t, f, root)
	all := startShared(t, e, "a", "b", "c")
	if _, err := freeze(e, "b", 1); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{"a": "THAWED", "b": "FROZEN", "c": "THAWED"} {
		if got := f.freezer(t, id); got != want {
			t.Errorf("%s is %s", id, got)
		}
	}
	f.exits <- instance.Exit{Container: "c.fn", Status: 137}
	for list(t, e)["c"] != nil {
		time.Sleep(time.Millisecond) // its removal is the engine's own affair
	}
	if now := list(t, e); now["a"].GetState() != hearthv1.State_STATE_SERVING || now["b"].GetState() != hearthv1.State_STATE_FROZEN {
		t.Errorf("there are %v", now)
	}
	if err := join(e, "d", "a", "acme", "low"); err != nil {
		t.Fatal(err)
	}
	d, err := serve(e, "d", shared("fn-d", "acme", "low"))
	if err != nil || d.Address == all["c"].Address {
		t.Errorf("d is %v, %v", d, err)
	}
	if err := discard(e, "d", 1); err != nil {
		t.Fatal(err)
	}
	stop()
	e, stop = runIn(t, f, root)
	defer stop()
	if err := join(e, "e", "a", "acme", "low"); err != nil {
		t.Fatal(err)
	}
	if i, err := serve(e, "e", shared("fn-e", "acme", "low")); err != nil || i.Address == all["c"].Address || i.Address == d.Address {
		t.Errorf("after a restart e is %v, %v", i, err)
	}
}

// TestRebuildPods: the next engine finds pods as they were, also those whose own Instance has gone, and workers that still wait.
func TestRebuildPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		root := t.TempDir()
		e, stop := runIn(t, f, root)
		before := startShared(t, e, "a", "b", "c")
		if err := join(e, "d", "a", "acme", "low"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // all is recorded
		if _, err := freeze(e, "c", 1); err != nil {
			t.Fatal(err)
		}
		if err := discard(e, "a", 1); err != nil {
			t.Fatal(err)
		}
		stop()
		e, stop = runIn(t, f, root)
		defer stop()
		time.Sleep(time.Minute) // a comparison finds nothing to remove
		now := list(t, e)
		for id, want := range map[string]hearthv1.State{
			"b": hearthv1.State_STATE_SERVING, "c": hearthv1.State_STATE_FROZEN, "d": hearthv1.State_STATE_WARM,
		} {
			if i := now[id]; i.GetState() != want || i.GetPod() != "a" || i.GetTenant() != "acme" || i.GetGroup() != "low" {
				t.Errorf("%s is %v", id, i)
			}
		}
		if len(now) != 3 || now["b"].GetAddress() != before["b"].Address {
			t.Errorf("there are %v", now)
		}
		wantCode(t, join(e, "x", "a", "evil", "low"), connect.CodeFailedPrecondition)
		_, err := serve(e, "d", shared("x", "evil", "low"))
		wantCode(t, err, connect.CodeFailedPrecondition)
		if _, err := serve(e, "d", shared("fn-d", "acme", "low")); err != nil {
			t.Error(err)
		}
		for id := range now {
			if err := discard(e, id, 1); err != nil {
				t.Error(err)
			}
		}
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
	})
}

// TestPodsEndWithTheirLast: whatever comes and goes at once, a sandbox is there as long as somebody is in it and no longer.
func TestPodsEndWithTheirLast(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	for round := range 20 {
		pod := fmt.Sprint("pod-", round)
		if err := create(e, pod); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for n := range 8 {
			all.Go(func() {
				id := fmt.Sprint(pod, "-", n)
				if n == 0 {
					id = pod
				} else if err := join(e, id, pod, "acme", "low"); err != nil {
					wantCode(t, err, connect.CodeFailedPrecondition) // they had all gone
					return
				}
				if rand.IntN(2) == 0 {
					if _, err := serve(e, id, shared("fn", "acme", "low")); err != nil {
						t.Error(err)
					}
				}
				if err := discard(e, id, 1); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	if got := f.left(); got != nothing || len(list(t, e)) != 0 {
		t.Errorf("left: %s", got)
	}
}

// TestSandboxOfWorkersEnds: with it all of them are gone.
func TestSandboxOfWorkersEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		startShared(t, e, "a", "b")
		f.exits <- instance.Exit{Container: "box-1"}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := f.left(); got != nothing || len(list(t, e)) != 0 {
			t.Errorf("left: %s", got)
		}
	})
}

func TestSidecarsAndGroups(t *testing.T) {
	f := newFake(t)
	f.config.Sidecar = "/none"
	e := run(t, f)
	wantCode(t, join(e, "b", "a", "acme", "low"), connect.CodeInvalidArgument)
	_, err := e.PrepareRevision(t.Context(), connect.NewRequest(&hearthv1.PrepareRevisionRequest{Revision: shared("x", "acme", "low")}))
	wantCode(t, err, connect.CodeInvalidArgument)
	if err == nil || !strings.Contains(err.Error(), "--sidecar none") {
		t.Errorf("%v does not say what to do", err)
	}
	_, err = serve(e, "a", shared("x", "acme", "low"))
	wantCode(t, err, connect.CodeInvalidArgument)
}
