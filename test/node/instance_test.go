package node_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func (n *instanceNode) revision(args ...string) *hearthv1.Revision {
	return &hearthv1.Revision{
		Name: "hello-00001", Function: "hello", Image: n.image, Port: 8080, Args: args, Env: map[string]string{"WHO": "world"},
		Resources: &hearthv1.Resources{MemoryBytes: 256 << 20, CpuMillis: 500},
	}
}

func (n *instanceNode) create(ids ...string) {
	n.t.Helper()
	for _, id := range ids {
		_, err := n.calls.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{Id: id}))
		if err != nil {
			n.t.Fatal(err)
		}
	}
}

func (n *instanceNode) tryActivate(id, claim string, r *hearthv1.Revision, within time.Duration) (*hearthv1.ActivateResponse, error) {
	answer, err := n.calls.Activate(context.Background(), connect.NewRequest(&hearthv1.ActivateRequest{
		InstanceId: id, Revision: r,
		Claim: &hearthv1.Claim{Id: claim, Epoch: 1, Deadline: timestamppb.New(time.Now().Add(within))},
	}))
	if err != nil {
		return nil, err
	}
	return answer.Msg, nil
}

func (n *instanceNode) activate(id string) *hearthv1.ActivateResponse {
	n.t.Helper()
	answer, err := n.tryActivate(id, "claim-"+id, n.revision(), 30*time.Second)
	if err != nil {
		n.t.Fatal(err)
	}
	return answer
}

func (n *instanceNode) discard(ids ...string) {
	n.t.Helper()
	for _, id := range ids {
		_, err := n.calls.Discard(context.Background(), connect.NewRequest(&hearthv1.DiscardRequest{InstanceId: id}))
		if err != nil {
			n.t.Fatal(err)
		}
	}
}

// states are those that WatchInstances begins with.
func (n *instanceNode) states() map[string]hearthv1.State {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	stream, err := n.calls.WatchInstances(ctx, connect.NewRequest(&hearthv1.WatchInstancesRequest{}))
	if err != nil {
		n.t.Fatal(err)
	}
	defer stream.Close()
	all := map[string]hearthv1.State{}
	for stream.Receive() && !stream.Msg().GetSynced() {
		all[stream.Msg().GetInstance().Id] = stream.Msg().GetInstance().State
	}
	if err := stream.Err(); err != nil {
		n.t.Fatal(err)
	}
	return all
}

func (n *instanceNode) get(address, path string) string {
	n.t.Helper()
	r, err := http.Get("http://" + address + path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		n.t.Fatalf("GET %s: %d, %v", path, r.StatusCode, err)
	}
	return string(body)
}

func describe(list []*hearthv1.Phase) string {
	var b strings.Builder
	for _, p := range list {
		fmt.Fprintf(&b, " %s@%.1f+%.1fms", p.Name, p.Offset.AsDuration().Seconds()*1e3, p.Duration.AsDuration().Seconds()*1e3)
	}
	return b.String()
}

func TestInstanceLives(t *testing.T) {
	n := newInstanceNode(t)
	n.create("one", "two")
	cold := n.activate("one")
	t.Logf("cold:%s", describe(cold.Phases))
	address := cold.Instance.Address
	for path, want := range map[string]string{
		"/": "hello", "/env?name=WHO": "world", "/env?name=PORT": "8080", "/env?name=HOSTNAME": "one",
		"/file?name=/etc/hostname": "one\n", "/file?name=/proc/sys/kernel/hostname": "one\n",
		"/file?name=/sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n", // v1, as on the machines that run this
	} {
		if got := n.get(address, path); got != want {
			t.Errorf("GET %s: %q, want %q", path, got, want)
		}
	}
	wantConfined(t, n.get(address, "/file?name=/proc/self/status"))
	n.wantReadOnly(address)
	if again := n.activate("one"); again.Instance.Address != address {
		t.Errorf("the same claim again: %s, want %s", again.Instance.Address, address)
	}
	if _, err := n.tryActivate("one", "other", n.revision(), time.Second); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("another claim: %v", err)
	}
	warm := n.activate("two")
	t.Logf("warm:%s", describe(warm.Phases))
	n.get(warm.Instance.Address, "/log?line=from+two")
	n.wantLogs("one listening on 8080", "two listening on 8080", "two from two")
	n.discard("one", "two")
	if err := n.leftBehind(); err != nil {
		t.Error(err)
	}
}

// wantConfined reads a process's status.
func wantConfined(t *testing.T, status string) {
	t.Helper()
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapInh:\t0", "CapPrm:\t0", "CapEff:\t0", "CapBnd:\t0", "CapAmb:\t0"} {
		if name, value, _ := strings.Cut(want, "\t"); strings.HasPrefix(name, "Cap") {
			want = name + "\t" + strings.Repeat(value, 16)
		}
		if !strings.Contains(status, want) {
			t.Errorf("its status has no %q:\n%s", want, status)
		}
	}
}

// wantReadOnly tries to write to an Instance's file systems.
func (n *instanceNode) wantReadOnly(address string) {
	n.t.Helper()
	for _, path := range []string{"/new", "/etc/new", "/etc/hosts", "/proc/sys/kernel/panic", "/sys/new"} {
		if got, want := n.get(address, "/write?name="+path), "open "+path+": read-only file system"; got != want {
			n.t.Errorf("writing to %s: %q, want %q", path, got, want)
		}
	}
	for _, path := range []string{"/tmp/new", "/var/tmp/new", "/dev/shm/new", "/run/new"} {
		if got := n.get(address, "/write?name="+path); got != "<nil>" {
			n.t.Errorf("writing to %s: %q", path, got)
		}
	}
}

// TestInstanceWritableRoot: an image's process writes to its root if its Revision says so, to memory and within bounds; and one
// that has no capability listens on port 80.
func TestInstanceWritableRoot(t *testing.T) {
	n := newInstanceNode(t)
	n.create("w-one", "w-two")
	r := n.revision()
	r.WritableRoot, r.Port = true, 80
	for _, id := range []string{"w-one", "w-two"} {
		answer, err := n.tryActivate(id, "claim-"+id, r, 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		address := answer.Instance.Address
		if got := n.get(address, "/file?name=/new"); got != "open /new: no such file or directory" {
			t.Errorf("what %s finds of another: %q", id, got)
		}
		for _, path := range []string{"/new", "/etc/new", "/tmp/new", "/function"} { // the last is the image's program
			if got := n.get(address, "/write?name="+path); got != "<nil>" && !strings.Contains(got, "text file busy") {
				t.Errorf("writing to %s: %q", path, got)
			}
		}
		wantConfined(t, n.get(address, "/file?name=/proc/self/status"))
		if got := n.try(address, "/fill?name=/fill"); !strings.Contains(got, "no space left") || !strings.HasPrefix(got, "12") {
			t.Errorf("of 256 MiB of memory the root took %q", got) // a half, less what is in it
		}
	}
	n.discard("w-one", "w-two")
	n.eventually(n.leftBehind)
}

func (n *instanceNode) wantLogs(want ...string) {
	n.t.Helper()
	n.wantLogsOf("hello", want...)
}

func (n *instanceNode) wantLogsOf(function string, want ...string) {
	n.t.Helper()
	n.eventually(func() error {
		stream, err := n.calls.Logs(context.Background(), connect.NewRequest(&hearthv1.LogsRequest{Function: function}))
		if err != nil {
			return err
		}
		defer stream.Close()
		var got []string
		for stream.Receive() {
			got = append(got, fmt.Sprintf("%s %s", stream.Msg().InstanceId, stream.Msg().Line))
		}
		slices.Sort(got)
		if slices.Sort(want); !slices.Equal(got, want) {
			return fmt.Errorf("logs are %q, want %q: %w", got, want, stream.Err())
		}
		return nil
	})
}

func TestInstanceStartsThatFail(t *testing.T) {
	n := newInstanceNode(t)
	for name, c := range map[string]struct {
		revision *hearthv1.Revision
		within   time.Duration
		code     connect.Code
		says     []string
	}{
		"exit":       {n.revision("exit"), 30 * time.Second, connect.CodeInternal, []string{"status 3", "line 10", "line 29"}},
		"sleep":      {n.revision("sleep"), 2 * time.Second, connect.CodeDeadlineExceeded, []string{"does not listen on port 8080"}},
		"loopback":   {n.revision("loopback"), 2 * time.Second, connect.CodeDeadlineExceeded, []string{"127.0.0.1 only"}},
		"no-program": {&hearthv1.Revision{Name: "x-1", Function: "x", Image: n.image, Port: 1, Command: []string{"/none"}}, 30 * time.Second, connect.CodeInternal, []string{"/none"}},
		"no-image":   {&hearthv1.Revision{Name: "x-1", Function: "x", Image: n.registry.Listener.Addr().String() + "/none:1", Port: 1}, 30 * time.Second, connect.CodeInternal, []string{"none:1"}},
	} {
		t.Run(name, func(t *testing.T) {
			n.create(name)
			_, err := n.tryActivate(name, "c", c.revision, c.within)
			if connect.CodeOf(err) != c.code {
				t.Fatalf("got %v, want %s", err, c.code)
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "line 9\n") {
				t.Errorf("more than 20 lines: %v", err)
			}
		})
	}
	n.eventually(n.leftBehind)
}

func TestInstanceEndsByItself(t *testing.T) {
	n := newInstanceNode(t)
	n.create("one")
	answer := n.activate("one")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := n.calls.WatchInstances(ctx, connect.NewRequest(&hearthv1.WatchInstancesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for stream.Receive() && !stream.Msg().GetSynced() {
	}
	go func() {
		r, err := http.Get("http://" + answer.Instance.Address + "/exit")
		if err == nil {
			r.Body.Close()
		}
	}()
	if !stream.Receive() || stream.Msg().GetInstance().GetState() != hearthv1.State_STATE_GONE {
		t.Fatalf("heard %v, %v", stream.Msg(), stream.Err())
	}
	n.eventually(n.leftBehind)
}

// TestLogOutlivesEngine: without an engine a Function's output is taken, and its log has the end of what it wrote before it ended; its
// processes find ordinary pipes.
func TestLogOutlivesEngine(t *testing.T) {
	n := newInstanceNode(t)
	n.create("l-one")
	address := n.activate("l-one").Instance.Address
	n.get(address, "/log?line=before")
	for _, fd := range []string{"1", "2"} {
		if got := n.get(address, "/file?name=/proc/self/fdinfo/"+fd); !strings.Contains(got, "flags:\t01\n") && !strings.Contains(got, "flags:\t0100001\n") {
			t.Errorf("descriptor %s is not a pipe that blocks: %q", fd, got)
		}
	}
	n.stop()
	for k := range 200 { // more than the pipe holds
		n.get(address, fmt.Sprintf("/log?line=%d+%s", k, strings.Repeat("x", 1000)))
	}
	n.get(address, "/log?line=last+words")
	if r, err := http.Get("http://" + address + "/exit"); err == nil {
		r.Body.Close()
	}
	n.startEngine()
	n.eventually(func() error {
		stream, err := n.calls.Logs(context.Background(), connect.NewRequest(&hearthv1.LogsRequest{Function: "hello"}))
		if err != nil {
			return err
		}
		defer stream.Close()
		var lines []string
		for stream.Receive() {
			lines = append(lines, string(stream.Msg().Line))
		}
		if len(lines) != 203 || lines[1] != "before" || lines[202] != "last words" || !strings.HasPrefix(lines[201], "199 x") {
			return fmt.Errorf("%d lines, of which the last is %.60q: %w", len(lines), lines[max(0, len(lines)-1):], stream.Err())
		}
		return nil
	})
	n.eventually(n.leftBehind)
}

// TestInstanceEngineRestart ends the engine with Instances in every state and starts another one over the same containerd.
func TestInstanceEngineRestart(t *testing.T) {
	n := newInstanceNode(t)
	n.create("warm", "serving", "starting")
	address := n.activate("serving").Instance.Address
	n.eventually(func() error { return n.recorded("serving") }) // that comes after the answer
	begun := make(chan error, 1)
	calls := n.calls
	go func() {
		_, err := calls.Activate(context.Background(), connect.NewRequest(&hearthv1.ActivateRequest{
			InstanceId: "starting", Revision: n.revision("sleep"), Claim: &hearthv1.Claim{Id: "c", Epoch: 1},
		}))
		begun <- err
	}()
	n.eventually(func() error {
		c, err := n.Client.LoadContainer(n.context(t), "starting.fn")
		if err != nil {
			return err
		}
		task, err := c.Task(n.context(t), nil)
		if err != nil {
			return err
		}
		program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", task.Pid()))
		if err == nil && filepath.Base(program) == "launcher" {
			err = errors.New("it still waits")
		}
		return err
	})
	n.stop()
	if err := <-begun; err == nil {
		t.Error("an activation that was cut off was answered")
	}
	if got := n.get(address, "/"); got != "hello" {
		t.Errorf("without an engine: %q", got)
	}
	n.startEngine()
	n.eventually(func() error {
		got := n.states()
		if len(got) != 2 || got["warm"] != hearthv1.State_STATE_WARM || got["serving"] != hearthv1.State_STATE_SERVING {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	if again := n.activate("serving"); again.Instance.Address != address {
		t.Errorf("the claim's repetition: %v", again)
	}
	n.get(n.activate("warm").Instance.Address, "/")
	n.discard("warm", "serving")
	n.eventually(n.leftBehind)
}

// TestInstanceContainerdKilled kills containerd under the engine, with one Instance that serves, one that is warm and one whose
// process ends while containerd is away.
func TestInstanceContainerdKilled(t *testing.T) {
	n := newInstanceNode(t)
	n.create("warm", "serving", "dying")
	address, dying := n.activate("serving").Instance.Address, n.activate("dying").Instance.Address
	n.kill(t)
	n.eventually(func() error {
		_, err := n.calls.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{Id: "meanwhile"}))
		if connect.CodeOf(err) != connect.CodeUnavailable {
			return fmt.Errorf("create while containerd is away: %w", err)
		}
		return nil
	})
	if r, err := http.Get("http://" + dying + "/exit"); err == nil {
		r.Body.Close()
	}
	if got := n.get(address, "/"); got != "hello" {
		t.Errorf("without containerd: %q", got)
	}
	n.start(t)
	n.eventually(func() error {
		got := n.states()
		if len(got) != 2 || got["warm"] != hearthv1.State_STATE_WARM || got["serving"] != hearthv1.State_STATE_SERVING {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	n.eventually(func() error { _, err := n.tryActivate("warm", "claim-warm", n.revision(), 30*time.Second); return err })
	// The end of a process must be told again.
	if r, err := http.Get("http://" + address + "/exit"); err == nil {
		r.Body.Close()
	}
	n.eventually(func() error {
		if got := n.states(); len(got) != 1 {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	n.discard("warm")
	n.eventually(n.leftBehind)
}

// TestInstanceForgetsImage: after ForgetRevision a start is as cold as the first, and our snapshotter holds nothing.
func TestInstanceForgetsImage(t *testing.T) {
	n := newInstanceNode(t)
	ctx := n.context(t)
	for round := range 2 {
		r, err := n.calls.PrepareRevision(t.Context(), connect.NewRequest(&hearthv1.PrepareRevisionRequest{Revision: n.revision(), Snapshots: 2}))
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Msg.Phases) < 2 || !strings.Contains(r.Msg.Image, "@sha256:") {
			t.Errorf("round %d: image %s, phases%s", round, r.Msg.Image, describe(r.Msg.Phases))
		}
		byDigest := n.revision()
		byDigest.Image = r.Msg.Image
		id := fmt.Sprint("i-", round)
		n.create(id)
		answer, err := n.tryActivate(id, "c-"+id, byDigest, 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range answer.Phases {
			if p.Name == "snapshot" || p.Name == "fetch" {
				t.Errorf("round %d: a prepared start waited for %s", round, p.Name)
			}
		}
		n.discard(id)
		_, err = n.calls.ForgetRevision(t.Context(), connect.NewRequest(&hearthv1.ForgetRevisionRequest{Revision: byDigest, RemoveImage: true}))
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range []string{n.image, r.Msg.Image} {
			if _, err := n.Client.GetImage(ctx, ref); !errdefs.IsNotFound(err) {
				t.Errorf("round %d: image %s is still there: %v", round, ref, err)
			}
		}
	}
	n.eventually(n.leftBehind)
}

// TestInstanceBurst starts several at once, from one image that is not there yet.
func TestInstanceBurst(t *testing.T) {
	n := newInstanceNode(t)
	ids := []string{"a", "b", "c", "d", "e", "f"}
	var all sync.WaitGroup
	for _, id := range ids {
		all.Go(func() {
			n.create(id)
			n.get(n.activate(id).Instance.Address, "/")
		})
	}
	all.Wait()
	for _, id := range ids {
		all.Go(func() { n.discard(id) })
	}
	all.Wait()
	n.eventually(n.leftBehind)
}
