package relay

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"time"
)

const maxReasonBytes = 2 << 10

// Refusal is an answer of a hop itself.
type Refusal struct {
	Status     int
	Code       string // constant, for programs
	Reason     string // for people, cut at 2 KiB when it is written
	Next       string // what the reader can do
	RetryAfter time.Duration
}

// Write answers with the refusal. HEAD and the like are net/http's business.
func (r *Refusal) Write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	if r.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(r.RetryAfter.Seconds()))))
	}
	w.WriteHeader(r.Status)
	_ = json.NewEncoder(w).Encode(struct {
		Error    string `json:"error"`
		Reason   string `json:"reason"`
		NextStep string `json:"next_step"`
	}{r.Code, Clip(r.Reason), r.Next})
}

// Clip bounds what is told of something that others have said: 2 KiB and a mark.
func Clip(s string) string {
	if len(s) > maxReasonBytes {
		return s[:maxReasonBytes] + "…"
	}
	return s
}
