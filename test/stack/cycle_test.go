package stack_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// How long the drills are. Those of `make test` are short; the long ones are asked for:
//
//	go test ./test/stack -run TestCycles -cycles 10000 -timeout 3h
//	go test ./test/stack -run TestKilledAtRandom -kills 200 -timeout 2h
var (
	sidecars = flag.Bool("sidecars", false, "give the Instances of TestCycles sidecars")
	cycles   = flag.Int("cycles", 60, "claims, each served and discarded, of TestCycles")
	kills    = flag.Int("kills", 6, "processes that TestKilledAtRandom kills, without sidecars and with them")
)

// cyclesForResident is from when on what nodeagent has resident is judged, and not its live heap alone: until then the pages that a
// collector keeps for later are most of it.
const cyclesForResident = 2000

// cycle claims an Instance, has it serve, and discards it.
func (d *deployment) cycle(ctx context.Context, client *http.Client, f tenant, id string, h *history) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	called := h.now()
	got, err := d.allocation.Allocate(ctx, connect.NewRequest(&hearthv1.AllocateRequest{Function: f.name, Id: id}))
	if err != nil {
		return fmt.Errorf("allocate: %w", err)
	}
	i := got.Msg.GetInstance()
	h.note(called, event{instance: i.GetId(), kind: eventAssigned, function: f.name, claim: i.GetClaim().GetId()})
	served := f.identify(ctx, client, "http://"+i.GetAddress())
	called = h.now()
	_, err = d.allocation.Release(ctx, connect.NewRequest(&hearthv1.ReleaseRequest{InstanceId: i.GetId(), Wait: true}))
	if err == nil {
		h.note(called, event{instance: i.GetId(), kind: eventReleased})
	}
	return errors.Join(served, err)
}

// TestCycles claims, serves and discards many times over, and counts before and after. Nothing is left of an Instance that has
// gone, no Instance was given to two, and nobody answered for another.
func TestCycles(t *testing.T) {
	const workers, warmUp = 3, 30
	d := start(t, func(c *stack.Config) { c.Sidecar = *sidecars })
	functions := d.tenants(t)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	h := newHistory()
	round := func(prefix string, n int) {
		var next atomic.Int64
		var all sync.WaitGroup
		for range workers {
			all.Go(func() {
				for i := int(next.Add(1)); i <= n && !t.Failed(); i = int(next.Add(1)) {
					if err := d.cycle(t.Context(), client, functions[i%len(functions)], fmt.Sprintf("%s-%d", prefix, i), h); err != nil {
						t.Errorf("cycle %d: %v", i, err)
					}
				}
			})
		}
		all.Wait()
		d.settles(t)
	}
	round("warm-up", warmUp)
	before := d.takeCensus(t)
	stopWatching := h.watch(d)
	defer stopWatching()
	began := time.Now()
	round("drill", *cycles)
	t.Logf("%d cycles took %v", *cycles, time.Since(began).Round(time.Millisecond))
	stopWatching()
	h.check(t, *cycles)
	memory := []string{memoryHeap}
	if *cycles >= cyclesForResident {
		memory = append(memory, memoryResident)
	}
	d.grewNot(t, before, memory...)
}
