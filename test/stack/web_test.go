package stack_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"
)

// web is a user's way to the Functions.
type web struct {
	gateway string
	client  *http.Client
}

func newWeb(gateway string) *web {
	return &web{gateway: gateway, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
}

func (w *web) close() { w.client.CloseIdleConnections() }

// answer is what came back.
type answer struct {
	code   int
	body   string
	header http.Header
}

// get asks a Function; it fails only if no answer came.
func (w *web) get(ctx context.Context, function, path string) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, longStart)
	defer cancel()
	return fetch(ctx, w.client, w.url(function)+path)
}

// url of a Function, to which paths are added.
func (w *web) url(function string) string { return w.gateway + "/fn/" + function }

// fetch asks whoever is there; it fails only if no answer came.
func fetch(ctx context.Context, client *http.Client, url string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{}, err
	}
	res, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	return answer{res.StatusCode, string(body), res.Header}, err
}

// errAnswer says that an answer came, and it was not the right one.
var errAnswer = errors.New("wrong answer")

// ask has a Function say its name.
func (w *web) ask(ctx context.Context, function string) error {
	a, err := w.get(ctx, function, "/env?name=ANSWER")
	if err != nil {
		return err
	}
	if a.code != http.StatusOK || a.body != function {
		return fmt.Errorf("%w: %d %s", errAnswer, a.code, a.body)
	}
	return nil
}

// answersBy asks until the right answer comes, which must be by the end.
func (w *web) answersBy(t *testing.T, function string, end time.Time) {
	t.Helper()
	ctx, cancel := context.WithDeadline(t.Context(), end)
	defer cancel()
	began, tries := time.Now(), 0
	var last error
	for ctx.Err() == nil {
		tries++
		err := w.ask(ctx, function)
		if err == nil {
			t.Logf("%s answered after %v, at attempt %d", function, time.Since(began).Round(time.Millisecond), tries)
			return
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		nap(ctx, 20*time.Millisecond)
	}
	t.Fatalf("%s does not answer within %v: %v", function, time.Since(began).Round(time.Millisecond), last)
}

// traffic asks a Function all the time, and counts what goes wrong.
type traffic struct {
	stop func()

	mu      sync.Mutex // guards what follows
	asked   int
	wrong   []error // answers, but not the right ones
	unheard []error // no answers
}

func (w *web) traffic(function string) *traffic {
	ctx, cancel := context.WithCancel(context.Background())
	f := &traffic{}
	var work sync.WaitGroup
	for range 2 {
		work.Go(func() {
			for ctx.Err() == nil {
				err := w.ask(ctx, function)
				if ctx.Err() != nil {
					return
				}
				f.count(err)
				nap(ctx, 5*time.Millisecond)
			}
		})
	}
	f.stop = sync.OnceFunc(func() {
		cancel()
		work.Wait()
	})
	return f
}

func (f *traffic) count(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	switch {
	case err == nil:
	case errors.Is(err, errAnswer):
		f.wrong = append(f.wrong, err)
	default:
		f.unheard = append(f.unheard, err)
	}
}

// check ends the traffic. Wrong answers are never right; connections may break only with the gateway.
func (f *traffic) check(t *testing.T, mayBreak bool) {
	t.Helper()
	f.stop()
	t.Logf("traffic: %d requests, %d wrong answers, %d broken connections", f.asked, len(f.wrong), len(f.unheard))
	if f.asked == 0 {
		t.Error("traffic: nothing was asked")
	}
	if len(f.wrong) > 0 {
		t.Errorf("traffic to a running instance: %d of %d answers were wrong, the first: %v", len(f.wrong), f.asked, f.wrong[0])
	}
	if len(f.unheard) > 0 && !mayBreak {
		t.Errorf("traffic to a running instance: %d of %d requests got no answer, the first: %v", len(f.unheard), f.asked, f.unheard[0])
	}
}

// nap waits a moment, or for the end of ctx.
func nap(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
