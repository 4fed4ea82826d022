package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"
)

// get asks over a connection of its own, as somebody who comes for the first time.
func get(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %.300s", resp.Status, body)
	}
	return string(body), err
}

// askTime is how long an answer may take before it is none.
const askTime = 30 * time.Second

// timed asks once, and returns how long that took.
func timed(ctx context.Context, url string) (answer string, took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	begun := time.Now()
	answer, err = get(ctx, url)
	return answer, time.Since(begun), err
}

// load is requests that come whether others are answered or not.
type load struct {
	stop context.CancelFunc
	all  sync.WaitGroup

	mu      sync.Mutex // guards what follows
	asked   int
	slowest time.Duration
	faults  []string
}

// startLoad asks the next of the URLs whenever an interval is over.
func startLoad(t *testing.T, every time.Duration, urls ...string) *load {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	l := &load{stop: stop}
	l.all.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				l.all.Go(func() { l.ask(context.WithoutCancel(ctx), urls[i%len(urls)]) })
			}
		}
	})
	return l
}

func (l *load) ask(ctx context.Context, url string) {
	begun := time.Now()
	_, took, err := timed(ctx, url)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked++
	l.slowest = max(l.slowest, took)
	if err != nil {
		l.faults = append(l.faults, fmt.Sprintf("%s after %v: %v", begun.Format("15:04:05.000"), took.Round(time.Millisecond), err))
	}
}

// end stops asking, and wants every request to have been answered, of which there have to be some.
func (l *load) end(t *testing.T, atLeast int) {
	t.Helper()
	l.stop()
	l.all.Wait()
	t.Logf("%d requests, %d without an answer, the slowest after %v", l.asked, len(l.faults), l.slowest.Round(time.Millisecond))
	for _, f := range l.faults[:min(len(l.faults), 10)] {
		t.Error(f)
	}
	if l.asked < atLeast {
		t.Errorf("only %d requests were made, want %d: they say nothing", l.asked, atLeast)
	}
}
