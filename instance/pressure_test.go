package instance_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

func TestWorth(t *testing.T) {
	const mib = 1 << 20
	base := instance.Keep{Age: time.Minute, Thaws: 3, Bytes: 50 * mib}
	for name, c := range map[string]struct{ more, less instance.Keep }{
		"needed more recently": {base, instance.Keep{Age: time.Hour, Thaws: 3, Bytes: 50 * mib}},
		"needed more often":    {base, instance.Keep{Age: time.Minute, Thaws: 0, Bytes: 50 * mib}},
		"smaller":              {base, instance.Keep{Age: time.Minute, Thaws: 3, Bytes: 500 * mib}},
		"small beats recent":   {instance.Keep{Age: 2 * time.Minute, Bytes: 10 * mib}, instance.Keep{Age: time.Minute, Bytes: 800 * mib}},
		"often beats recent":   {instance.Keep{Age: 10 * time.Minute, Thaws: 30, Bytes: mib}, instance.Keep{Age: time.Minute, Bytes: mib}},
	} {
		if c.more.Worth() <= c.less.Worth() {
			t.Errorf("%s: worth %g is not more than %g", name, c.more.Worth(), c.less.Worth())
		}
	}
	odd := instance.Keep{}
	if w := odd.Worth(); w != 1 {
		t.Errorf("one just frozen, of no size, is worth %g", w)
	}
}

func TestSurplus(t *testing.T) {
	const mib = 1 << 20
	all := []instance.Keep{
		{ID: "old", Age: time.Hour, Bytes: 10 * mib},
		{ID: "new", Age: time.Second, Bytes: 10 * mib},
		{ID: "big", Age: time.Minute, Bytes: 1000 * mib},
		{ID: "often", Age: time.Hour, Thaws: 100, Bytes: 10 * mib},
	}
	for name, c := range map[string]struct {
		count int
		bytes int64
		want  string
	}{
		"room for all":       {4, 1030 * mib, ""},
		"one too many":       {3, 1030 * mib, "big count"},
		"too large":          {4, 100 * mib, "big bytes"},
		"both":               {2, 15 * mib, "big count, old count, often bytes"},
		"none may be frozen": {0, 1030 * mib, "big count, old count, often count, new count"},
		"no memory for any":  {4, 1, "big bytes, old bytes, often bytes, new bytes"},
	} {
		ids, reasons := instance.Surplus(all, c.count, c.bytes)
		var got []string
		for n := range ids {
			got = append(got, ids[n]+" "+reasons[n])
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// freezeMany makes n frozen Instances, a minute apart, the last of them needed most recently.
func freezeMany(t *testing.T, e *instance.Engine, n int) {
	t.Helper()
	for i := range n {
		id := fmt.Sprint("i-", i)
		if err := create(e, id); err != nil {
			t.Fatal(err)
		}
		if _, err := activate(e, id, "c-"+id, 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		if _, err := freeze(e, id, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
	}
}

func TestFrozenAreBounded(t *testing.T) {
	for name, config := range map[string]instance.Config{
		"by count": {MaxFrozen: 2},
		"by bytes": {FrozenBytes: 5 << 20}, // the fake's take 2 MiB each
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.config = config
				e, stop := runUntil(t, f)
				defer stop()
				freezeMany(t, e, 4)
				if got := slices.Sorted(maps.Keys(list(t, e))); !slices.Equal(got, []string{"i-2", "i-3"}) {
					t.Errorf("kept %v", got)
				}
				if f.grace != 5*time.Second {
					t.Errorf("the grace was %s", f.grace)
				}
			})
		})
	}
}

func TestMemoryPressure(t *testing.T) {
	for name, c := range map[string]struct{ pressure, meminfo, relief string }{
		"PSI":          {"some avg10=12.50 avg60=1.00 avg300=0.10 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", "", "some avg10=9.99 avg60=9.99 avg300=9.99 total=2\n"},
		"no PSI":       {"", "MemTotal: 16000 kB\nMemFree: 8000 kB\nMemAvailable: 900 kB\n", ""},
		"PSI disabled": {"?", "MemTotal: 16000 kB\nMemAvailable: 900 kB\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				e, stop := runUntil(t, f)
				defer stop()
				say := func(file, text string) {
					path := filepath.Join(f.host, "proc", file)
					if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
						t.Fatal(err)
					}
				}
				say("meminfo", "MemTotal: 16000 kB\nMemAvailable: 9000 kB\n")
				freezeMany(t, e, 4)
				if got := len(list(t, e)); got != 4 {
					t.Fatalf("%d are kept without pressure", got)
				}
				if c.pressure != "" {
					say("pressure/memory", c.pressure)
				}
				if c.meminfo != "" {
					say("meminfo", c.meminfo)
				}
				time.Sleep(2 * time.Second) // two looks
				synctest.Wait()
				if got := slices.Sorted(maps.Keys(list(t, e))); !slices.Equal(got, []string{"i-2", "i-3"}) {
					t.Errorf("kept %v", got)
				}
				if f.grace != 0 {
					t.Errorf("the grace was %s", f.grace)
				}
				say("pressure/memory", c.relief)
				say("meminfo", "MemTotal: 16000 kB\nMemAvailable: 9000 kB\n")
				time.Sleep(time.Minute)
				if got := len(list(t, e)); got != 2 {
					t.Errorf("%d are kept after the pressure", got)
				}
			})
		})
	}
}

// TestServingIsNotEvicted: only what is frozen is given up.
func TestServingIsNotEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.config = instance.Config{MaxFrozen: -1}
		e, stop := runUntil(t, f)
		defer stop()
		for _, id := range []string{"a", "b"} {
			if err := create(e, id); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := activate(e, "a", "c", 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		states := list(t, e)
		if states["a"].GetState() != hearthv1.State_STATE_SERVING || states["b"].GetState() != hearthv1.State_STATE_WARM {
			t.Errorf("states are %v", states)
		}
	})
}

func FuzzKernelTexts(f *testing.F) {
	f.Add([]byte("SigPnd:\t0000000000000000\nShdPnd:\t0000000000004000\n"))
	f.Add([]byte("SigPnd:\t-1\nsome\n"))
	f.Fuzz(func(_ *testing.T, text []byte) {
		instance.EndPending(text)
	})
}
