package gateway_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/gateway"
)

func TestTimingRoundTrip(t *testing.T) {
	phases := []gateway.Phase{
		{Name: "queue", Duration: 1234567 * time.Nanosecond},
		{Name: "fetch", Offset: 3 * time.Millisecond, Duration: time.Second, Busy: 400 * time.Millisecond},
		{Name: "claim", Offset: -time.Millisecond},
	}
	value := gateway.FormatTiming(phases)
	want := `queue;dur=1.235;desc="offset=0.000", fetch;dur=1000.000;desc="offset=3.000";busy=400.000, claim;dur=0.000;desc="offset=-1.000"`
	if value != want {
		t.Errorf("got  %s\nwant %s", value, want)
	}
	got, err := gateway.ParseTiming([]string{value, `db;dur=53, cache;desc="a;b";dur=2`})
	phases[0].Duration = 1235 * time.Microsecond
	if err != nil || !slices.Equal(got, phases) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{`a;dur=x;desc="offset=1"`, `a;desc="offset=NaN"`, `a;desc="offset=1e300"`, strings.Repeat("x", 1<<16)} {
		if _, err := gateway.ParseTiming([]string{bad}); err == nil {
			t.Errorf("%.40q is taken", bad)
		}
	}
}

func FuzzTiming(f *testing.F) {
	f.Add("fetch", int64(1000), int64(2000), int64(3), `x;dur=1;desc="offset=2"`)
	f.Add("a,b;c=\"\r\nX: y", int64(-1), int64(0), int64(0), `;;;,,,`)
	f.Add("", int64(1)<<62, int64(1)<<61, int64(-5), `a;desc="offset=1";dur=`)
	f.Fuzz(func(t *testing.T, name string, offset, duration, busy int64, foreign string) {
		p := gateway.Phase{Name: name, Offset: time.Duration(offset), Duration: time.Duration(duration), Busy: time.Duration(busy)}
		value := gateway.FormatTiming([]gateway.Phase{p, p})
		for _, c := range value {
			if c < ' ' || c > '~' {
				t.Fatalf("header value %q", value)
			}
		}
		got, err := gateway.ParseTiming([]string{value})
		if abs(offset) < 1e17 && abs(duration) < 1e17 && abs(busy) < 1e17 && (err != nil || len(got) != 2) {
			t.Fatalf("%q: %v, %v", value, got, err)
		}
		_, _ = gateway.ParseTiming(http.Header{"X": {foreign}}["X"])
	})
}

func abs(v int64) float64 { return max(float64(v), -float64(v)) }
