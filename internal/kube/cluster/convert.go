package cluster

import (
	"maps"
	"slices"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Labels that are not Hearth's alone. The daemons' pods have the name hearth and a component each.
const (
	managedBy      = "app.kubernetes.io/managed-by"
	nameLabel      = "app.kubernetes.io/name"
	componentLabel = "app.kubernetes.io/component"
)

// daemonsName is the daemons' name by nameLabel.
const daemonsName = "hearth"

// The daemons, by componentLabel, and as their DaemonSet and Deployments are called.
const (
	nodeagent   = "nodeagent"
	poolmanager = "poolmanager"
	gateway     = "gateway"
)

// runtimeLabel says which Runtime is booted in an Instance's pod.
const runtimeLabel = "hearth.dev/runtime"

// secretName is the Secret with what `hearth deploy --secret` was given for a Function.
func secretName(function string) string { return "hearth-" + function }

// functionObject is a Function as a user of the cluster would write it. What is not said is left out: the API server has the defaults.
func functionObject(f *hearthv1.Function) *crd.Function {
	s := f.GetSpec()
	object := &crd.Function{
		ObjectMeta: metav1.ObjectMeta{Name: f.GetName()},
		Spec: crd.FunctionSpec{
			Image: s.GetImage(), Runtime: s.GetRuntime(), Port: s.GetPort(), Env: envVars(s.GetEnv()), Timeout: durationOf(s.GetTimeout()),
			Scaling: scalingObject(s.GetScaling()), Tenant: s.GetTenant(), Group: s.GetGroup(), WritableRoot: s.GetWritableRoot(),
		},
	}
	for _, word := range s.GetCommand() {
		object.Spec.Command = append(object.Spec.Command, crd.Word(word))
	}
	for _, word := range s.GetArgs() {
		object.Spec.Args = append(object.Spec.Args, crd.Word(word))
	}
	for _, host := range s.GetHosts() {
		object.Spec.Hosts = append(object.Spec.Hosts, crd.Host(host))
	}
	if code := s.GetCode(); code != nil {
		object.Spec.Code = &crd.Code{Package: code.GetPackage(), Handler: code.GetHandler(), Signature: signatureNames[code.GetSignature()]}
	}
	for _, name := range slices.Sorted(maps.Keys(s.GetSecrets())) {
		object.Spec.Secrets = append(object.Spec.Secrets, crd.SecretFile{Name: name, SecretKeyRef: crd.SecretKeyRef{Name: secretName(f.GetName()), Key: name}})
	}
	if millis := s.GetResources().GetCpuMillis(); millis != 0 {
		object.Spec.Resources.CPU = resource.NewMilliQuantity(millis, resource.DecimalSI)
	}
	if bytes := s.GetResources().GetMemoryBytes(); bytes != 0 {
		object.Spec.Resources.Memory = resource.NewQuantity(bytes, resource.BinarySI)
	}
	return object
}

var signatureNames = map[hearthv1.Signature]crd.Signature{
	hearthv1.Signature_SIGNATURE_HTTP: crd.SignatureHTTP, hearthv1.Signature_SIGNATURE_CLOUDEVENT: crd.SignatureCloudEvent,
}

func scalingObject(s *hearthv1.Scaling) crd.Scaling {
	out := crd.Scaling{
		Concurrency: s.GetConcurrency(), Min: s.GetMin(), Max: s.GetMax(), Window: durationOf(s.GetWindow()), Grace: durationOf(s.GetGrace()), Queue: s.GetQueue(),
	}
	if frozen := s.GetFrozen(); frozen != 0 { // negative is none, in a message whose 0 means the default
		frozen = max(0, frozen)
		out.Frozen = &frozen
	}
	return out
}

func durationOf(d *durationpb.Duration) *metav1.Duration {
	if d == nil {
		return nil
	}
	return &metav1.Duration{Duration: d.AsDuration()}
}

func envVars(env map[string]string) (out []crd.EnvVar) {
	for _, name := range slices.Sorted(maps.Keys(env)) {
		out = append(out, crd.EnvVar{Name: name, Value: env[name]})
	}
	return out
}

// functionMessage is a Function as the daemons' API has it, without the values of its secrets.
func functionMessage(f *crd.Function) *hearthv1.Function {
	s := &f.Spec
	out := &hearthv1.Function{
		Name: f.Name,
		Spec: &hearthv1.FunctionSpec{
			Image: s.Image, Runtime: s.Runtime, Port: s.Port, Env: envMap(s.Env), Timeout: durationMessage(s.Timeout), Scaling: scalingMessage(&s.Scaling),
			Tenant: s.Tenant, Group: s.Group, WritableRoot: s.WritableRoot, Command: texts(s.Command), Args: texts(s.Args), Hosts: texts(s.Hosts),
			Resources: &hearthv1.Resources{},
		},
		Status: &hearthv1.FunctionStatus{
			Generation: f.Generation, Revision: f.Status.LatestRevision, Ready: f.Status.Ready, Starting: f.Status.Starting, Desired: f.Status.Desired,
			Reason: f.Status.Reason, CreatedAt: timestamppb.New(f.CreationTimestamp.Time),
		},
	}
	if p := progressOf(f); !p.done {
		out.Status.Reason = p.text
	}
	if s.Resources.CPU != nil {
		out.Spec.Resources.CpuMillis = s.Resources.CPU.MilliValue()
	}
	if s.Resources.Memory != nil {
		out.Spec.Resources.MemoryBytes = s.Resources.Memory.Value()
	}
	if s.Code != nil {
		out.Spec.Code = &hearthv1.Code{Package: s.Code.Package, Handler: s.Code.Handler}
		for message, name := range signatureNames {
			if name == s.Code.Signature {
				out.Spec.Code.Signature = message
			}
		}
	}
	for _, file := range s.Secrets {
		if out.Spec.Secrets == nil {
			out.Spec.Secrets = map[string][]byte{}
		}
		out.Spec.Secrets[file.Name] = nil
	}
	return out
}

func scalingMessage(s *crd.Scaling) *hearthv1.Scaling {
	out := &hearthv1.Scaling{
		Concurrency: s.Concurrency, Min: s.Min, Max: s.Max, Window: durationMessage(s.Window), Grace: durationMessage(s.Grace), Queue: s.Queue,
	}
	if s.Frozen != nil {
		out.Frozen = *s.Frozen
		if out.Frozen == 0 {
			out.Frozen = -1
		}
	}
	return out
}

func durationMessage(d *metav1.Duration) *durationpb.Duration {
	if d == nil {
		return nil
	}
	return durationpb.New(d.Duration)
}

func envMap(env []crd.EnvVar) map[string]string {
	if len(env) == 0 {
		return nil
	}
	out := make(map[string]string, len(env))
	for _, v := range env {
		out[v.Name] = v.Value
	}
	return out
}

func texts[T ~string](words []T) (out []string) {
	for _, w := range words {
		out = append(out, string(w))
	}
	return out
}

func runtimeObject(r *hearthv1.Runtime) *crd.Runtime {
	object := &crd.Runtime{
		ObjectMeta: metav1.ObjectMeta{Name: r.GetName()},
		Spec:       crd.RuntimeSpec{Image: r.GetImage(), Env: envVars(r.GetEnv())},
	}
	for _, library := range r.GetPreload() {
		object.Spec.Preload = append(object.Spec.Preload, crd.Library(library))
	}
	return object
}

// runtimeMessage is a Runtime as the daemons' API has it; warm is how many of it should wait on a node.
func runtimeMessage(r *crd.Runtime, warm int32) *hearthv1.Runtime {
	return &hearthv1.Runtime{
		Name: r.Name, Image: r.Spec.Image, Preload: texts(r.Spec.Preload), Env: envMap(r.Spec.Env), Warm: warm, Generation: r.Generation,
		Status: &hearthv1.RuntimeStatus{Warm: r.Status.Warm, Error: r.Status.Error},
	}
}
