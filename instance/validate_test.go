package instance_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func TestActivateRefuses(t *testing.T) {
	e := run(t, newFake(t))
	if err := create(e, "a"); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*hearthv1.ActivateRequest)
		code   connect.Code
	}{
		"no claim":              {func(r *hearthv1.ActivateRequest) { r.Claim = nil }, connect.CodeInvalidArgument},
		"no claim id":           {func(r *hearthv1.ActivateRequest) { r.Claim.Id = "" }, connect.CodeInvalidArgument},
		"claim id with newline": {func(r *hearthv1.ActivateRequest) { r.Claim.Id = "a\nb" }, connect.CodeInvalidArgument},
		"negative epoch":        {func(r *hearthv1.ActivateRequest) { r.Claim.Epoch = -1 }, connect.CodeInvalidArgument},
		"deadline is no time": {func(r *hearthv1.ActivateRequest) {
			r.Claim.Deadline = &timestamppb.Timestamp{Seconds: math.MaxInt64}
		}, connect.CodeInvalidArgument},
		"deadline has passed": {func(r *hearthv1.ActivateRequest) {
			r.Claim.Deadline = timestamppb.New(time.Now().Add(-time.Second))
		}, connect.CodeDeadlineExceeded},
		"path as instance": {func(r *hearthv1.ActivateRequest) { r.InstanceId = "../a" }, connect.CodeInvalidArgument},
		"unknown instance": {func(r *hearthv1.ActivateRequest) { r.InstanceId = "b" }, connect.CodeNotFound},
		"no revision":      {func(r *hearthv1.ActivateRequest) { r.Revision = nil }, connect.CodeInvalidArgument},
		"path as function": {func(r *hearthv1.ActivateRequest) { r.Revision.Function = "a/../../b" }, connect.CodeInvalidArgument},
		"no revision name": {func(r *hearthv1.ActivateRequest) { r.Revision.Name = "" }, connect.CodeInvalidArgument},
		"port 0":           {func(r *hearthv1.ActivateRequest) { r.Revision.Port = 0 }, connect.CodeInvalidArgument},
		"port 65536":       {func(r *hearthv1.ActivateRequest) { r.Revision.Port = 65536 }, connect.CodeInvalidArgument},
		"image":            {func(r *hearthv1.ActivateRequest) { r.Revision.Image = "UPPER:!" }, connect.CodeInvalidArgument},
		"environment name": {func(r *hearthv1.ActivateRequest) { r.Revision.Env = map[string]string{"A=B": ""} }, connect.CodeInvalidArgument},
		"environment NUL":  {func(r *hearthv1.ActivateRequest) { r.Revision.Env = map[string]string{"A": "\x00"} }, connect.CodeInvalidArgument},
		"environment size": {func(r *hearthv1.ActivateRequest) {
			r.Revision.Env = map[string]string{"A": strings.Repeat("x", 1<<20)}
		}, connect.CodeInvalidArgument},
		"argument NUL":         {func(r *hearthv1.ActivateRequest) { r.Revision.Args = []string{"\x00"} }, connect.CodeInvalidArgument},
		"argument size":        {func(r *hearthv1.ActivateRequest) { r.Revision.Args = []string{strings.Repeat("x", 1<<20)} }, connect.CodeInvalidArgument},
		"runtime without code": {func(r *hearthv1.ActivateRequest) { r.Revision.Image, r.Revision.Runtime = "", python(1) }, connect.CodeInvalidArgument},
		"code without runtime": {func(r *hearthv1.ActivateRequest) { r.Revision.Image, r.Revision.Code = "", &hearthv1.Code{} }, connect.CodeInvalidArgument},
		"runtime and image":    {func(r *hearthv1.ActivateRequest) { r.Revision = inPython(1); r.Revision.Image = "x" }, connect.CodeInvalidArgument},
		"runtime and command":  {func(r *hearthv1.ActivateRequest) { r.Revision = inPython(1); r.Revision.Args = []string{"x"} }, connect.CodeInvalidArgument},
		"runtime's name":       {func(r *hearthv1.ActivateRequest) { r.Revision = inPython(1); r.Revision.Runtime.Name = "../x" }, connect.CodeInvalidArgument},
		"preload with a comma": {func(r *hearthv1.ActivateRequest) {
			r.Revision = inPython(1)
			r.Revision.Runtime.Preload = []string{"a,b"}
		}, connect.CodeInvalidArgument},
		"handler with newline": {func(r *hearthv1.ActivateRequest) { r.Revision = inPython(1); r.Revision.Code.Handler = "a\n" }, connect.CodeInvalidArgument},
		"signature":            {func(r *hearthv1.ActivateRequest) { r.Revision = inPython(1); r.Revision.Code.Signature = 9 }, connect.CodeInvalidArgument},
		"secret is a path": {func(r *hearthv1.ActivateRequest) {
			r.Revision.Secrets = map[string][]byte{"../etc/passwd": nil}
		}, connect.CodeInvalidArgument},
		"secret is a directory": {func(r *hearthv1.ActivateRequest) { r.Revision.Secrets = map[string][]byte{"..": nil} }, connect.CodeInvalidArgument},
		"secrets' size": {func(r *hearthv1.ActivateRequest) {
			r.Revision.Secrets = map[string][]byte{"a": make([]byte, 300<<10)}
		}, connect.CodeInvalidArgument},
		"memory": {func(r *hearthv1.ActivateRequest) {
			r.Revision.Resources = &hearthv1.Resources{MemoryBytes: -1}
		}, connect.CodeInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			req := &hearthv1.ActivateRequest{InstanceId: "a", Revision: revision(), Claim: &hearthv1.Claim{Id: "c", Epoch: 1}}
			c.change(req)
			_, err := e.Activate(t.Context(), connect.NewRequest(req))
			if err == nil {
				t.Fatal("it was accepted")
			}
			wantCode(t, err, c.code)
		})
	}
	if got := list(t, e)["a"].State; got != hearthv1.State_STATE_WARM {
		t.Errorf("refused claims left it %s", got)
	}
}

func TestOthersRefuse(t *testing.T) {
	e := run(t, newFake(t))
	wantCode(t, create(e, "Not_A_Label"), connect.CodeInvalidArgument)
	wantCode(t, create(e, strings.Repeat("x", 64)), connect.CodeInvalidArgument)
	for _, degree := range []hearthv1.Degree{hearthv1.Degree_DEGREE_RUNTIME, hearthv1.Degree_DEGREE_REVISION, 99} {
		_, err := e.CreateInstance(t.Context(), connect.NewRequest(&hearthv1.CreateInstanceRequest{Id: "a", Degree: degree}))
		wantCode(t, err, connect.CodeInvalidArgument)
	}
	_, err := e.Discard(t.Context(), connect.NewRequest(&hearthv1.DiscardRequest{InstanceId: "a", Grace: durationpb.New(time.Hour)}))
	wantCode(t, err, connect.CodeInvalidArgument)
	if err := discard(e, "unknown", 0); err != nil {
		t.Errorf("an unknown instance is an error: %v", err)
	}
	_, err = prepare(e, 1000)
	wantCode(t, err, connect.CodeInvalidArgument)
}
