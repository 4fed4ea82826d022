package stack_test

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// refused checks an answer of the gateway's own: its status, Retry-After where another attempt may help, and words for people.
func refused(t *testing.T, a answer, err error, code int, retry bool, words ...string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if a.code != code {
		t.Fatalf("answer %d %s, want %d", a.code, a.body, code)
	}
	if after, err := strconv.Atoi(a.header.Get("Retry-After")); retry && (err != nil || after < 1) {
		t.Errorf("Retry-After is %q, want seconds", a.header.Get("Retry-After"))
	}
	var said struct {
		Error, Reason string
		NextStep      string `json:"next_step"`
	}
	if err := json.Unmarshal([]byte(a.body), &said); err != nil || said.Error == "" || said.NextStep == "" {
		t.Errorf("body %q is not what programs expect: %v", a.body, err)
	}
	for _, w := range words {
		if !strings.Contains(said.Reason, w) {
			t.Errorf("reason %q does not name %q", said.Reason, w)
		}
	}
}

// TestRefusals has the whole deployment say no, and say why.
func TestRefusals(t *testing.T) {
	d := start(t)
	probe := push(t, d.status.Registry, "probe", probeImage(t))
	falls := push(t, d.status.Registry, "falls", withArgs(t, probeImage(t), "fall"))

	t.Run("queue is full", func(t *testing.T) {
		d.mustDeploy(t, "narrow", probe, func(s *hearthv1.FunctionSpec) {
			s.Scaling = &hearthv1.Scaling{Concurrency: 1, Max: 1, Queue: 1}
		})
		defer d.remove(t, "narrow")
		if a, err := d.web.get(t.Context(), "narrow", "/busy?ms=0"); err != nil || a.code != http.StatusOK {
			t.Fatalf("answer %d %s, error %v", a.code, a.body, err)
		}
		var mu sync.Mutex // guards answers
		answers := map[int][]answer{}
		var asked sync.WaitGroup
		for range 4 {
			asked.Go(func() {
				a, err := d.web.get(t.Context(), "narrow", "/busy?ms=1500")
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				answers[a.code] = append(answers[a.code], a)
			})
		}
		asked.Wait()
		if len(answers[http.StatusOK]) != 2 || len(answers[http.StatusTooManyRequests]) != 2 {
			t.Fatalf("want two answers 200, of the one that ran and the one that waited, and two 429: %v", answers)
		}
		refused(t, answers[http.StatusTooManyRequests][0], nil, http.StatusTooManyRequests, true, "narrow")
	})
	t.Run("image does not exist", func(t *testing.T) {
		image := d.status.Registry + "/nowhere:1"
		if err := d.deploy(t, "missing", image, false); err != nil {
			t.Fatal(err)
		}
		defer d.remove(t, "missing")
		a, err := d.web.get(t.Context(), "missing", "/")
		refused(t, a, err, http.StatusServiceUnavailable, true, "missing", image)
	})
	t.Run("process ends at once", func(t *testing.T) {
		d.mustDeploy(t, "falls", falls)
		defer d.remove(t, "falls")
		a, err := d.web.get(t.Context(), "falls", "/")
		refused(t, a, err, http.StatusServiceUnavailable, true, "falls", "7", "probe: out of coal")
	})
	t.Run("answer comes too late", func(t *testing.T) {
		d.mustDeploy(t, "slow", probe, func(s *hearthv1.FunctionSpec) { s.Timeout = durationpb.New(time.Second) })
		defer d.remove(t, "slow")
		for end := time.Now().Add(longStart); ; nap(t.Context(), 20*time.Millisecond) { // a start may take longer than that second, too
			a, err := d.web.get(t.Context(), "slow", "/busy?ms=0")
			if err == nil && a.code == http.StatusOK {
				break
			}
			if err != nil || a.code != http.StatusGatewayTimeout || time.Now().After(end) {
				t.Fatalf("answer %d %s, error %v", a.code, a.body, err)
			}
		}
		a, err := d.web.get(t.Context(), "slow", "/busy?ms=4000")
		refused(t, a, err, http.StatusGatewayTimeout, false, "slow", "1s")
	})
	t.Run("function does not exist", func(t *testing.T) {
		a, err := d.web.get(t.Context(), "nobody", "/")
		refused(t, a, err, http.StatusNotFound, false, "nobody")
	})
	d.settles(t)
}
