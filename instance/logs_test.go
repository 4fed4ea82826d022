package instance_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/internal/logfile"
)

func write(t *testing.T, e *instance.Engine, id, text string, at time.Time) string {
	t.Helper()
	path, err := e.LogPath("hello", id)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if !at.IsZero() {
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestLogs(t *testing.T) {
	e := run(t, newFake(t))
	write(t, e, "old", "1\n2\n3\n", time.Unix(1000, 0))
	write(t, e, "new", "4\n\n6", time.Unix(2000, 0))
	for name, c := range map[string]struct {
		req  *hearthv1.LogsRequest
		want string
	}{
		"all":          {&hearthv1.LogsRequest{}, "old 1|old 2|old 3|new 4|new |new 6"},
		"one instance": {&hearthv1.LogsRequest{InstanceId: "old"}, "old 1|old 2|old 3"},
		"tail":         {&hearthv1.LogsRequest{Tail: 2}, "new |new 6"},
		"tail of two":  {&hearthv1.LogsRequest{Tail: 5}, "old 2|old 3|new 4|new |new 6"},
		"tail of more": {&hearthv1.LogsRequest{Tail: 50}, "old 1|old 2|old 3|new 4|new |new 6"},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			c.req.Function = "hello"
			err := e.StreamLogs(t.Context(), c.req, func(l *hearthv1.LogsResponse) error {
				got = append(got, fmt.Sprintf("%s %s", l.InstanceId, l.Line))
				return nil
			})
			if err != nil || strings.Join(got, "|") != c.want {
				t.Errorf("got %q, %v; want %q", strings.Join(got, "|"), err, c.want)
			}
		})
	}
}

// patience is for what another goroutine brings about; a test that needs all of it has failed.
const patience = 2 * time.Minute

func TestLogsFollow(t *testing.T) {
	e := run(t, newFake(t))
	path := write(t, e, "a", "before\nhalf", time.Time{})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	steps := []struct {
		wait string
		then func()
	}{
		{"before", func() { write(t, e, "a", " whole\n", time.Time{}) }},
		{"half whole", func() { write(t, e, "b", "another\n", time.Time{}) }},
		{"another", func() {
			if err := os.Truncate(path, 0); err != nil {
				t.Error(err)
			}
			write(t, e, "a", "anew\n", time.Time{})
		}},
		{"anew", cancel},
	}
	err := e.StreamLogs(ctx, &hearthv1.LogsRequest{Function: "hello", Follow: true}, func(l *hearthv1.LogsResponse) error {
		if len(steps) > 0 {
			if string(l.Line) != steps[0].wait {
				t.Errorf("got %q, want %q", l.Line, steps[0].wait)
			}
			steps[0].then()
			steps = steps[1:]
		}
		return nil
	})
	if err != nil || len(steps) > 0 {
		t.Errorf("%v; %d lines have not come", err, len(steps))
	}
}

// TestLogsThatLostTheirBeginning: of a log that had too much, the end is read, after a line that says what is missing; and whoever
// follows while it is cut gets whole lines, in order, or that line.
func TestLogsThatLostTheirBeginning(t *testing.T) {
	e := run(t, newFake(t))
	path, err := e.LogPath("hello", "a")
	if err != nil {
		t.Fatal(err)
	}
	w, err := logfile.Open(path, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	const lines = 40_000
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var followed []string
	ended := make(chan error, 1)
	go func() {
		ended <- e.StreamLogs(ctx, &hearthv1.LogsRequest{Function: "hello", Follow: true}, func(l *hearthv1.LogsResponse) error {
			followed = append(followed, string(l.Line))
			if strings.HasPrefix(string(l.Line), "the end") {
				cancel()
			}
			return nil
		})
	}()
	s := w.Stream()
	for n := range lines {
		s.Write(fmt.Appendf(nil, "line %d %s\n", n, strings.Repeat("x", 90)))
	}
	s.Write([]byte("the end\n"))
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	last := -1
	for _, line := range followed {
		var n int
		switch _, err := fmt.Sscanf(line, "line %d x", &n); {
		case strings.HasPrefix(line, "hearth: ") && strings.Contains(line, "were dropped") || line == "the end":
		case err != nil || n <= last || len(line) != len(fmt.Sprintf("line %d ", n))+90:
			t.Fatalf("after line %d came %.120q", last, line)
		default:
			last = n
		}
	}
	if last != lines-1 {
		t.Errorf("the last line is %d", last)
	}
	var tail []string
	err = e.StreamLogs(t.Context(), &hearthv1.LogsRequest{Function: "hello", Tail: lines}, func(l *hearthv1.LogsResponse) error {
		tail = append(tail, string(l.Line))
		return nil
	})
	var lost int
	if _, scan := fmt.Sscanf(tail[0], "hearth: %d lines (", &lost); err != nil || scan != nil || lost+len(tail)-1 != lines+1 {
		t.Errorf("the tail begins %.100q and has %d lines; %v", tail[0], len(tail), err)
	}
}

func TestOnlyTheLastLogsAreKept(t *testing.T) {
	e := run(t, newFake(t))
	for n := range 13 {
		id := fmt.Sprintf("i-%02d", n)
		if err := create(e, id); err != nil {
			t.Fatal(err)
		}
		if _, err := activate(e, id, "c-"+id, 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		write(t, e, id, id+"\n", time.Unix(int64(n), 0))
		if err := discard(e, id, 1); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	collect := func() []string {
		got = nil
		if err := e.StreamLogs(t.Context(), &hearthv1.LogsRequest{Function: "hello"}, func(l *hearthv1.LogsResponse) error {
			got = append(got, string(l.Line))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return got
	}
	for deadline := time.Now().Add(patience); len(collect()) > 10 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond) // they are removed after the answer
	}
	if len(got) != 10 || !slices.IsSorted(got) || got[0] != "i-03" {
		t.Errorf("kept: %v", got)
	}
}

func TestLogsRefuse(t *testing.T) {
	e := run(t, newFake(t))
	for name, c := range map[string]struct {
		req  *hearthv1.LogsRequest
		code connect.Code
	}{
		"path as function": {&hearthv1.LogsRequest{Function: "../../etc"}, connect.CodeInvalidArgument},
		"path as instance": {&hearthv1.LogsRequest{Function: "f", InstanceId: "../x"}, connect.CodeInvalidArgument},
		"negative tail":    {&hearthv1.LogsRequest{Function: "f", Tail: -1}, connect.CodeInvalidArgument},
		"unknown":          {&hearthv1.LogsRequest{Function: "f"}, connect.CodeNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			err := e.StreamLogs(t.Context(), c.req, func(*hearthv1.LogsResponse) error { return nil })
			if err == nil {
				t.Fatal("it was accepted")
			}
			wantCode(t, instance.ConnectError(err), c.code)
		})
	}
}

// FuzzLines: whatever a function writes, and however it comes, its bytes are all sent, in order, in pieces that are not too long.
func FuzzLines(f *testing.F) {
	f.Add([]byte("a\nb"), []byte("c\n\n"))
	f.Add([]byte(""), []byte("\x00\xff"))
	f.Add(bytes.Repeat([]byte("x"), 64<<10), []byte("\n"))
	f.Add(bytes.Repeat([]byte("x"), 200<<10), []byte("y\nz"))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		lines, err := instance.SplitLines(first, second)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range lines {
			if len(l) > 64<<10 || bytes.Contains(l, []byte("\n")) {
				t.Fatalf("a line of %d bytes", len(l))
			}
		}
		all := bytes.ReplaceAll(append(slices.Clone(first), second...), []byte("\n"), nil)
		if !bytes.Equal(bytes.Join(lines, nil), all) {
			t.Fatalf("sent %q of %q", bytes.Join(lines, nil), all)
		}
	})
}
