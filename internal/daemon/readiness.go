package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"
)

// errStarting stands until a service has said anything of itself.
var errStarting = errors.New("starting")

// Readiness is a set of named conditions; a daemon is ready when there is at least one and all of them hold. Safe for
// concurrent use. The zero value is ready for use, and says "not ready".
type Readiness struct {
	mu         sync.Mutex // guards conditions
	conditions map[string]error
}

// Set says how a condition stands: nil when it holds, otherwise why it does not.
func (r *Readiness) Set(name string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conditions == nil {
		r.conditions = map[string]error{}
	}
	r.conditions[name] = err
}

// Follow asks how a condition stands, often until it holds for the first time and then each second, until ctx is done.
func (r *Readiness) Follow(ctx context.Context, name string, check func(context.Context) error) error {
	for pause := 50 * time.Millisecond; ctx.Err() == nil; {
		err := check(ctx)
		r.Set(name, err)
		if err == nil {
			pause = time.Second
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}

// Err is nil when ready; otherwise it names the conditions that do not hold, with their reasons.
func (r *Readiness) Err() error {
	conditions := r.snapshot()
	if len(conditions) == 0 {
		return errStarting
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(conditions)) {
		if err := conditions[name]; err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func (r *Readiness) snapshot() map[string]error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.conditions)
}

// ServeHTTP answers 200 when ready and 503 otherwise; with ?verbose it details each condition in JSON.
func (r *Readiness) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	err := r.Err()
	code := http.StatusOK
	if err != nil {
		code = http.StatusServiceUnavailable
	}
	if req.URL.Query().Has("verbose") {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(r.detail(err == nil))
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	if err != nil {
		_, _ = fmt.Fprintln(w, err)
		return
	}
	_, _ = fmt.Fprintln(w, "ready")
}

type conditionJSON struct {
	Ready  bool   `json:"ready"`
	Reason string `json:"reason,omitempty"`
}

type readinessJSON struct {
	Ready      bool                     `json:"ready"`
	Conditions map[string]conditionJSON `json:"conditions"`
}

func (r *Readiness) detail(ready bool) readinessJSON {
	out := readinessJSON{Ready: ready, Conditions: map[string]conditionJSON{}}
	for name, err := range r.snapshot() {
		c := conditionJSON{Ready: err == nil}
		if err != nil {
			c.Reason = err.Error()
		}
		out.Conditions[name] = c
	}
	return out
}
