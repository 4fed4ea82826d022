package trace_test

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/hearth-serverless/hearth/prefetch/trace"
)

func TestEveryHierarchy(t *testing.T) {
	tr := newTracer(t)
	root := tree(t, "a", "b")
	for name, top := range hierarchies(t) {
		t.Run(name, func(t *testing.T) {
			group := cgroup(t, top, "hearth-trace-hierarchy")
			below := cgroup(t, group, "below")
			other := cgroup(t, top, "hearth-trace-other")
			r := begin(t, tr, []string{group}, []string{root})
			child(t, []string{other}, "read="+filepath.Join(root, "b"))
			child(t, []string{below}, "read="+filepath.Join(root, "a"))
			got := end(t, r)
			if !has(of(t, got, filepath.Join(root, "a")), 40*page) {
				t.Error("what a cgroup below read was not seen")
			}
			if a := of(t, got, filepath.Join(root, "b")); len(a) > 0 {
				t.Errorf("what another cgroup read was seen: %+v", a)
			}
		})
	}
}

func TestSeveralRecordings(t *testing.T) {
	tr := newTracer(t)
	top := someHierarchy(t)
	one, two := cgroup(t, top, "hearth-trace-one"), cgroup(t, top, "hearth-trace-two")
	root := tree(t, "a", "b", "c")
	path := func(name string) string { return filepath.Join(root, name) }

	first := begin(t, tr, []string{one}, []string{root})
	child(t, []string{one}, "read="+path("a"))
	same := begin(t, tr, []string{one}, []string{root})
	other := begin(t, tr, []string{two}, []string{root})
	child(t, []string{two}, "read="+path("b"))
	child(t, []string{one}, "read="+path("a"), "read="+path("c")) // the second for itself: a is known to the kernel already
	gotOther, gotFirst := end(t, other), end(t, first)
	child(t, []string{one}, "read="+path("b"))
	gotSame := end(t, same)

	for _, c := range []struct {
		name string
		got  trace.Trace
		want []string
	}{{"first", gotFirst, []string{"a", "c"}}, {"same", gotSame, []string{"a", "b", "c"}}, {"other", gotOther, []string{"b"}}} {
		var seen []string
		for _, name := range []string{"a", "b", "c"} {
			if accesses := of(t, c.got, path(name)); has(accesses, 40*page) {
				sound(t, accesses, 64*page)
				seen = append(seen, name)
			}
		}
		if !slices.Equal(seen, c.want) {
			t.Errorf("%s saw %q, want %q", c.name, seen, c.want)
		}
	}
}

func TestReady(t *testing.T) {
	tr := newTracer(t)
	group := cgroup(t, someHierarchy(t), "hearth-trace-ready")
	root := tree(t, "a", "b")
	r := begin(t, tr, []string{group}, []string{root})
	child(t, []string{group}, "read="+filepath.Join(root, "a"))
	r.Ready()
	child(t, []string{group}, "read="+filepath.Join(root, "a"), "read="+filepath.Join(root, "b"))
	r.Ready() // says nothing new
	got := end(t, r)
	for name, want := range map[string]bool{"a": false, "b": true} {
		accesses := of(t, got, filepath.Join(root, name))
		if len(accesses) == 0 {
			t.Errorf("%s was not seen", name)
		}
		for _, a := range accesses {
			if a.Ready != want {
				t.Errorf("%s: %+v", name, a)
			}
		}
	}
	if again, err := r.End(); err != nil || !slices.Equal(again.Accesses, got.Accesses) {
		t.Errorf("a second End returns %+v, %v", again, err)
	}
}

// TestLostIsCounted keeps the buffer of 4 KiB from being read.
func TestLostIsCounted(t *testing.T) {
	tr := newTracer(t, trace.EBPF)
	tr.SetBuffer(4096)
	group := cgroup(t, someHierarchy(t), "hearth-trace-lost")
	var names, args []string
	for i := range 400 {
		names = append(names, "file"+strconv.Itoa(i))
	}
	root := tree(t, names...)
	for _, name := range names {
		args = append(args, "pread="+filepath.Join(root, name))
	}
	r := begin(t, tr, []string{group}, []string{root})
	release := r.Stall()
	child(t, []string{group}, args...)
	release()
	got, err := r.End()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, name := range names {
		if len(of(t, got, filepath.Join(root, name))) > 0 {
			seen++
		}
	}
	if got.Lost == 0 || seen == 0 || seen+int(got.Lost) < len(names) {
		t.Errorf("of %d files %d were seen and %d events lost", len(names), seen, got.Lost)
	}
	r = begin(t, tr, []string{group}, []string{root})
	child(t, []string{group}, args[0])
	end(t, r) // those that others lost do not count
}

// TestNothingIsLeft compares what kernel objects this process holds.
func TestNothingIsLeft(t *testing.T) {
	for _, method := range []string{trace.EBPF, trace.Fanotify} {
		t.Run(method, func(t *testing.T) {
			group := cgroup(t, someHierarchy(t), "hearth-trace-left")
			root := tree(t, "a")
			tr := newTracer(t, method)
			held(t) // the poller of the Go runtime, if not yet
			before := held(t)
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					for range 3 {
						r, err := tr.Begin([]string{group}, []string{root})
						if err != nil {
							t.Error(err)
							return
						}
						r.Ready()
						if _, err := r.End(); err != nil {
							t.Error(err)
						}
					}
				})
			}
			all.Wait()
			if idle := held(t); slices.ContainsFunc(idle, watches) {
				t.Errorf("nothing is recorded, and there is %q", idle)
			}
			r := begin(t, tr, []string{group}, []string{root})
			if now := held(t); !slices.ContainsFunc(now, watches) {
				t.Errorf("a recording holds %q: this test sees nothing", now)
			}
			if err := tr.Close(); err != nil {
				t.Error(err)
			}
			if after := held(t); !slices.Equal(after, before) {
				t.Errorf("held before %q, after %q", before, after)
			}
			if _, err := r.End(); err != nil {
				t.Error(err)
			}
			if _, err := tr.Begin([]string{group}, []string{root}); !errors.Is(err, trace.ErrClosed) {
				t.Errorf("begin after close: %v", err)
			}
		})
	}
}

// watches says whether a file descriptor attaches programs, or marks files.
func watches(fd string) bool {
	return strings.Contains(fd, "tracepoint") || strings.Contains(fd, "link") || strings.Contains(fd, "fanotify")
}

// held lists what file descriptors of this process are that have no path.
func held(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name())); err == nil && strings.HasPrefix(to, "anon_inode:") {
			out = append(out, to)
		}
	}
	slices.Sort(out)
	return out
}

func TestBeginRefuses(t *testing.T) {
	tr := newTracer(t)
	group := cgroup(t, someHierarchy(t), "hearth-trace-refuses")
	root := t.TempDir()
	before := held(t)
	for name, c := range map[string]struct {
		groups, roots []string
		want          error
	}{
		"no cgroup":         {nil, []string{root}, nil},
		"no root":           {[]string{group}, nil, nil},
		"another directory": {[]string{root}, []string{root}, nil},
		"a cgroup gone":     {[]string{group, group + "gone"}, []string{root}, fs.ErrNotExist},
		"a root gone":       {[]string{group}, []string{root, root + "gone"}, fs.ErrNotExist},
		"too many":          {slices.Repeat([]string{group}, 1000), []string{root}, nil},
	} {
		r, err := tr.Begin(c.groups, c.roots)
		if err == nil {
			_, _ = r.End()
			t.Errorf("%s: began", name)
		} else if c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if after := held(t); !slices.Equal(after, before) {
		t.Errorf("held before %q, after %q", before, after)
	}
}

func TestRefused(t *testing.T) {
	_, err := trace.New(slog.New(slog.DiscardHandler), "none", "neither")
	if !errors.Is(err, trace.ErrUnsupported) || !strings.Contains(err.Error(), "none") || !strings.Contains(err.Error(), "neither") {
		t.Errorf("error %v", err)
	}
}
