import sys, time, os, torch, difflib, contextlib, pickle
out=os.environ["OUT"]
import ciuic_compile.planner; F=sys.modules["ciuic_compile.planner.fit"]
import ciuic_compile.confirm as C, ciuic_compile.partitioner as P, ciuic_compile
from bench.budgets import made
from bench.step_time import WithLossView, step_of
from bench import common
M=2**20
RealFit=F.Fit
def Fit(*a,**k):
    f=RealFit(*a,**k); log.append("%.1f/%.1f c%.0f"%(f.peaks.peak/M,f.evaluation.peak_bytes/M,f.evaluation.cost)); return f
F.Fit=Fit
S=F.solve
def solve(p,*a,**k):
    r=S(p,*a,**k); log.append(" [solve %.1f %s gap %s]"%(p.budget/M,type(r).__name__,getattr(r,"gap",None))); return r
F.solve=solve
log=[]
RC=C._replay
def rep(f,b,j,d,s):
    r=RC(f,b,j,d,s); log.append(" {replay %s ws %s}"%(r,d.workspaces))
    n=len([x for x in os.listdir(out) if x.startswith("trace")])
    if n<2:
        open(f"{out}/trace{n}.txt","w").write("FWD\n"+"\n".join(map(str,f.events))+"\nBWD\n"+"\n".join(map(str,b.events)))
    return r
C._replay=rep
if sys.argv[1]=="real":
    spec={"model":"resnet50","batch":256,"device":"cuda","size":"medium"}
    import bench.budgets as B, argparse
    from bench.models import MODELS, WithLoss
    built,batches,loss=MODELS["resnet50"]("medium",batch=256)
    dev=torch.device("cuda")
    model=WithLoss(built,loss).to(dev); x=batches(0,dev)
    torch._logging.set_logs(output_code=False)
    for b in map(float,sys.argv[2:]):
        log.clear(); torch._dynamo.reset()
        run=torch.compile(WithLossView(model),backend="ciuic",options={"mode":"lossless","budget":int(b*M),"report":"off"})
        step=step_of(model,common.under_autocast(run,"autocast",dev),*x)
        step()
        p=ciuic_compile.plans()[-1]
        print("REAL",b,p.planned_peak_bytes/M,p.simulated_peak_bytes/M,p.time_us,p.gap,p.correction_bytes,"\n   "+"\n   ".join(log),flush=True)
else:
    from bench.models import MODELS, WithLoss
    from ciuic_compile import planning
    for b in map(float,sys.argv[2:]):
        log.clear()
        built,batches,loss=MODELS["resnet50"]("medium",batch=256)
        (p,)=planning.plan(WithLoss(built,loss),batches(0,torch.device("cpu")),options={"mode":"lossless","budget":int(b*M)},device="h200",autocast="bfloat16")
        print("PLAN",b,p.planned_peak_bytes/M,p.time_us,p.gap,"\n   "+"\n   ".join(log),flush=True)
