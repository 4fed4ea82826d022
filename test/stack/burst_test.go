package stack_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// TestBurst sends many first requests at once to a Function whose Instances take one at a time.
func TestBurst(t *testing.T) {
	const requests, most = 30, 5
	d := start(t)
	image := push(t, d.status.Registry, "probe", probeImage(t))
	d.mustDeploy(t, "burst", image, func(s *hearthv1.FunctionSpec) {
		s.Scaling = &hearthv1.Scaling{Concurrency: 1, Max: most, Window: durationpb.New(2 * time.Second), Grace: durationpb.New(time.Second)}
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	counted := make(chan int, 1)
	go func() { counted <- d.countMost(ctx, "burst") }()

	var mu sync.Mutex // guards hosts
	hosts := map[string]int{}
	var asked sync.WaitGroup
	for range requests {
		asked.Go(func() {
			a, err := d.web.get(ctx, "burst", "/busy?ms=100")
			if err != nil || a.code != http.StatusOK {
				t.Errorf("answer %d %s, error %v", a.code, a.body, err)
				return
			}
			var host string
			var together int
			if _, err := fmt.Sscan(a.body, &host, &together); err != nil {
				t.Errorf("answer %q: %v", a.body, err)
			}
			mu.Lock()
			defer mu.Unlock()
			hosts[host]++
			if together != 1 {
				t.Errorf("instance %s served %d requests at once", host, together)
			}
		})
	}
	asked.Wait()
	cancel()
	t.Logf("requests by instance: %v", hosts)
	if n := <-counted; n > most || n < 1 {
		t.Errorf("up to %d instances were seen, the limit is %d", n, most)
	}
	if len(hosts) < 2 {
		t.Errorf("%d instances served %d requests: none was added", len(hosts), requests)
	}
	d.fallsToZero(t, "burst", 20*time.Second)
	d.settles(t)
}

// countMost says how many Instances of a Function there were at most while ctx lasted.
func (d *deployment) countMost(ctx context.Context, function string) (most int) {
	for ctx.Err() == nil {
		if list, err := d.instances(ctx, function); err == nil {
			most = max(most, len(list))
		}
		nap(ctx, 5*time.Millisecond)
	}
	return most
}

// fallsToZero waits until a Function has no Instance any more but frozen ones, which cost nothing.
func (d *deployment) fallsToZero(t *testing.T, function string, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	began := time.Now()
	for ctx.Err() == nil {
		frozen := func(i *hearthv1.Instance) bool { return i.GetState() == hearthv1.State_STATE_FROZEN }
		if list, err := d.instances(ctx, function); err == nil && len(slices.DeleteFunc(list, frozen)) == 0 {
			t.Logf("%s was at zero after %v", function, time.Since(began).Round(time.Millisecond))
			return
		}
		nap(ctx, 50*time.Millisecond)
	}
	got, err := d.functions.Get(t.Context(), connect.NewRequest(&hearthv1.GetRequest{Name: function}))
	if err != nil {
		t.Fatal(err)
	}
	t.Fatalf("%s is not at zero after %v: %v", function, within, got.Msg.GetFunction().GetStatus())
}
