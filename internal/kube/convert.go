package kube

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/types/known/durationpb"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// defaultPort is where a process listens whose Function says nothing of that.
const defaultPort = 8080

// FunctionSpec is a custom resource's spec in the words of the pool. Secrets are the values of its files, by the files' names.
func FunctionSpec(f *crd.FunctionSpec, secrets map[string][]byte) *hearthv1.FunctionSpec {
	out := &hearthv1.FunctionSpec{
		Image: f.Image, Runtime: f.Runtime, Code: codeMessage(f.Code), Port: f.Port, Env: envMap(f.Env),
		Command: fromWords[string](f.Command), Args: fromWords[string](f.Args), Hosts: fromWords[string](f.Hosts),
		Timeout: durationMessage(f.Timeout), Resources: resourcesMessage(f.Resources), Secrets: secrets, Tenant: f.Tenant, Group: f.Group,
		WritableRoot: f.WritableRoot,
		Scaling: &hearthv1.Scaling{Concurrency: f.Scaling.Concurrency, Min: f.Scaling.Min, Max: f.Scaling.Max, Queue: f.Scaling.Queue,
			Window: durationMessage(f.Scaling.Window), Grace: durationMessage(f.Scaling.Grace)},
	}
	if out.Port == 0 && out.Group == "" {
		out.Port = defaultPort // as its Revision has it, from which it may have to be read back
	}
	switch n := f.Scaling.Frozen; {
	case n == nil: // the default
	case *n <= 0:
		out.Scaling.Frozen = -1 // here 0 is none, there the default
	default:
		out.Scaling.Frozen = *n
	}
	return out
}

// FunctionResource is a spec as a custom resource's, whose secrets are in the Secret of that name, each under its file's name.
func FunctionResource(f *hearthv1.FunctionSpec, secretName string) crd.FunctionSpec {
	out := crd.FunctionSpec{
		Image: f.GetImage(), Runtime: f.GetRuntime(), Code: codeResource(f.GetCode()), Port: f.GetPort(), Env: envList(f.GetEnv()),
		Command: fromWords[crd.Word](f.GetCommand()), Args: fromWords[crd.Word](f.GetArgs()), Hosts: fromWords[crd.Host](f.GetHosts()),
		Timeout: durationResource(f.GetTimeout()), Resources: resourcesResource(f.GetResources()), Tenant: f.GetTenant(), Group: f.GetGroup(),
		WritableRoot: f.GetWritableRoot(),
		Scaling: crd.Scaling{Concurrency: f.GetScaling().GetConcurrency(), Min: f.GetScaling().GetMin(), Max: f.GetScaling().GetMax(),
			Queue: f.GetScaling().GetQueue(), Window: durationResource(f.GetScaling().GetWindow()), Grace: durationResource(f.GetScaling().GetGrace())},
	}
	if n := f.GetScaling().GetFrozen(); n != 0 {
		n = max(0, n)
		out.Scaling.Frozen = &n
	}
	for name := range f.GetSecrets() {
		out.Secrets = append(out.Secrets, crd.SecretFile{Name: name, SecretKeyRef: crd.SecretKeyRef{Name: secretName, Key: name}})
	}
	slices.SortFunc(out.Secrets, func(a, b crd.SecretFile) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// RevisionSpec is a Revision as a custom resource's spec, which never changes: its image is the one that the Function has, and the digest
// that it was resolved to belongs into the status.
func RevisionSpec(r *hearthv1.Revision, image, secretName string) crd.RevisionSpec {
	out := crd.RevisionSpec{
		Function: r.GetFunction(), Image: image, Runtime: r.GetRuntime().GetName(), Code: codeResource(r.GetCode()), Port: r.GetPort(),
		Env: envList(r.GetEnv()), Command: fromWords[crd.Word](r.GetCommand()), Args: fromWords[crd.Word](r.GetArgs()),
		Resources: resourcesResource(r.GetResources()), Concurrency: r.GetConcurrency(), Tenant: r.GetTenant(), Group: r.GetGroup(),
		WritableRoot: r.GetWritableRoot(),
	}
	if len(r.GetSecrets()) > 0 {
		out.SecretName = secretName
	}
	if out.Group != "" {
		out.Port = 0
	}
	return out
}

// Revision is a custom resource in the words of the pool, with its image by digest if that is known.
func Revision(r *crd.Revision, secrets map[string][]byte) *hearthv1.Revision {
	s := &r.Spec
	out := &hearthv1.Revision{
		Name: r.Name, Function: s.Function, Image: s.Image, Code: codeMessage(s.Code), Port: s.Port, Env: envMap(s.Env),
		Command: fromWords[string](s.Command), Args: fromWords[string](s.Args), Resources: resourcesMessage(s.Resources), Secrets: secrets,
		Concurrency: s.Concurrency, Tenant: s.Tenant, Group: s.Group, WritableRoot: s.WritableRoot,
	}
	if s.Image != "" && r.Status.Image != "" {
		out.Image = r.Status.Image
	}
	if s.Runtime != "" {
		out.Runtime = &hearthv1.Runtime{Name: s.Runtime}
	}
	if out.Port == 0 {
		out.Port = defaultPort
	}
	return out
}

// AcceptedSpec is the spec that a Revision was made of: what Instances notice is in the Revision, and the rest, which makes no Revision, as the
// Function has it now. A Function that was changed while nobody led is seen to differ from this.
func AcceptedSpec(f *crd.FunctionSpec, r *crd.Revision, secrets map[string][]byte) *hearthv1.FunctionSpec {
	s := &r.Spec
	out := FunctionSpec(&crd.FunctionSpec{
		Image: s.Image, Runtime: s.Runtime, Code: s.Code, Port: s.Port, Env: s.Env, Command: s.Command, Args: s.Args, Resources: s.Resources,
		Tenant: s.Tenant, Group: s.Group, WritableRoot: s.WritableRoot, Scaling: f.Scaling, Hosts: f.Hosts, Timeout: f.Timeout,
	}, secrets)
	out.Scaling.Concurrency = s.Concurrency
	return out
}

// RuntimeMessage is a Runtime in the words of the pool. How many wait of it, WarmPools say.
func RuntimeMessage(r *crd.Runtime) *hearthv1.Runtime {
	return &hearthv1.Runtime{Name: r.Name, Image: r.Spec.Image, Preload: fromWords[string](r.Spec.Preload), Env: envMap(r.Spec.Env)}
}

// RuntimeResource is a Runtime as a custom resource's spec.
func RuntimeResource(r *hearthv1.Runtime) crd.RuntimeSpec {
	return crd.RuntimeSpec{Image: r.GetImage(), Preload: fromWords[crd.Library](r.GetPreload()), Env: envList(r.GetEnv())}
}

func codeMessage(c *crd.Code) *hearthv1.Code {
	if c == nil {
		return nil
	}
	out := &hearthv1.Code{Package: c.Package, Handler: c.Handler, Signature: hearthv1.Signature_SIGNATURE_HTTP}
	if c.Signature == crd.SignatureCloudEvent {
		out.Signature = hearthv1.Signature_SIGNATURE_CLOUDEVENT
	}
	return out
}

func codeResource(c *hearthv1.Code) *crd.Code {
	if c == nil {
		return nil
	}
	out := &crd.Code{Package: c.GetPackage(), Handler: c.GetHandler(), Signature: crd.SignatureHTTP}
	if c.GetSignature() == hearthv1.Signature_SIGNATURE_CLOUDEVENT {
		out.Signature = crd.SignatureCloudEvent
	}
	return out
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

func envList(env map[string]string) []crd.EnvVar {
	var out []crd.EnvVar
	for name, value := range env {
		out = append(out, crd.EnvVar{Name: name, Value: value})
	}
	slices.SortFunc(out, func(a, b crd.EnvVar) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func fromWords[To, From ~string](words []From) []To {
	if len(words) == 0 {
		return nil
	}
	out := make([]To, len(words))
	for n, w := range words {
		out[n] = To(w)
	}
	return out
}

func durationMessage(d *metav1.Duration) *durationpb.Duration {
	if d == nil {
		return nil
	}
	return durationpb.New(d.Duration)
}

func durationResource(d *durationpb.Duration) *metav1.Duration {
	if d == nil {
		return nil
	}
	return &metav1.Duration{Duration: d.AsDuration()}
}

func resourcesMessage(r crd.Resources) *hearthv1.Resources {
	out := &hearthv1.Resources{}
	if r.Memory != nil {
		out.MemoryBytes = r.Memory.Value()
	}
	if r.CPU != nil {
		out.CpuMillis = r.CPU.MilliValue()
	}
	if out.MemoryBytes == 0 && out.CpuMillis == 0 {
		return nil
	}
	return out
}

func resourcesResource(r *hearthv1.Resources) crd.Resources {
	var out crd.Resources
	if n := r.GetMemoryBytes(); n != 0 {
		out.Memory = resource.NewQuantity(n, resource.BinarySI)
	}
	if n := r.GetCpuMillis(); n != 0 {
		out.CPU = resource.NewMilliQuantity(n, resource.DecimalSI)
	}
	return out
}
