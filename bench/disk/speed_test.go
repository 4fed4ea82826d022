package disk

import (
	"testing"
	"time"
)

// TestDue makes requests at certain times, and looks when the last of their bytes has come.
func TestDue(t *testing.T) {
	const ms, kilobyte = time.Millisecond, 1000
	type request struct {
		at    time.Duration
		bytes int
		due   time.Duration
	}
	for _, c := range []struct {
		name     string
		requests []request
	}{
		{"one waits for the latency and for its bytes", []request{{at: 7 * ms, bytes: 100 * kilobyte, due: 8500 * time.Microsecond}}},
		{"they share the latency, and then the rate", []request{
			{0, 100 * kilobyte, 1500 * time.Microsecond}, {0, 100 * kilobyte, 2500 * time.Microsecond}, {0, 100 * kilobyte, 3500 * time.Microsecond},
		}},
		{"small ones at once take no longer than one", []request{{0, 0, ms / 2}, {0, 0, ms / 2}, {0, 0, ms / 2}}},
		{"one after the other pay it each", []request{{0, 100 * kilobyte, 1500 * time.Microsecond}, {1500 * time.Microsecond, 100 * kilobyte, 3 * ms}}},
		{"the latency passes while others get their bytes", []request{{0, 1000 * kilobyte, 10500 * time.Microsecond}, {10 * ms, 100 * kilobyte, 11500 * time.Microsecond}}},
		{"nothing is saved up", []request{{0, 100 * kilobyte, 1500 * time.Microsecond}, {10 * time.Second, 100 * kilobyte, 10*time.Second + 1500*time.Microsecond}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := pacer{speed: Named()["limited"]}
			for i, r := range c.requests {
				if due := p.due(r.at, r.bytes); due != r.due {
					t.Errorf("request %d, made at %v, is due at %v, want %v", i, r.at, due, r.due)
				}
			}
		})
	}
}

// TestRate has many requests under way for as long as ten seconds of the rate last.
func TestRate(t *testing.T) {
	p := pacer{speed: Named()["limited"]}
	const requestsAtOnce, bytes = 8, 128 << 10
	var under [requestsAtOnce]time.Duration
	end := time.Duration(0)
	for read := int64(0); read < 10*p.speed.BytesPerSecond; read += bytes {
		i := 0
		for j := range under {
			if under[j] < under[i] {
				i = j
			}
		}
		under[i] = p.due(under[i], bytes)
		end = under[i]
	}
	if end < 10*time.Second || end > 10*time.Second+3*time.Millisecond {
		t.Errorf("it took %v, want 10 s", end)
	}
}
